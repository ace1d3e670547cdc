"""Q2_K, Q4_K and Q5_K on lanes: the compiled version of ``q2_q4_q5_k``, a block of 256 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import (
    from_half,
    nearest_clipped,
    nearest_int,
    store_half,
    to_half,
)
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    any_lane,
    at_most,
    floats,
    load,
    magnitude,
    negative,
    square_root,
    store,
    to_floats,
    to_ints,
    where,
)
from bamba_quant.codecs.compiled.packing import Pack, packers, unpacker
from bamba_quant.codecs.compiled.search import fit_qkx, fit_qp, square_sum, weigh
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.q2_q4_q5_k import BLOCK, Q2, Q4, Q5, KQuant
from bamba_quant.codecs.search import spans_around

_SPANS_2, _SPANS_4, _SPANS_5 = Q2.plain.spans, Q4.plain.spans, Q5.plain.spans
_WEIGHTED_2, _WEIGHTED_4, _WEIGHTED_5 = Q2.weighted.spans, Q4.weighted.spans, Q5.weighted.spans
_LEVELS_15, _LEVELS_63 = spans_around(Q2.levels, 4), spans_around(Q4.levels, 4)


def _packers_of(kind: KQuant) -> tuple[Any, Pack]:
    """A function that packs scales and minima and replaces them by what a reader finds, and one that packs codes."""
    layout = kind.layout
    pack_scales, pack_minima, pack_codes = packers(layout.scales, layout.minima, layout.codes)
    unpack_scales, unpack_minima = unpacker(layout.scales), unpacker(layout.minima)

    @inlined
    def pack_groups(scales: Any, minima: Any, packed: Any) -> None:
        pack_scales(scales, packed)
        pack_minima(minima, packed)
        unpack_scales(scales, packed)
        unpack_minima(minima, packed)

    return pack_groups, pack_codes


def _numbers_of(kind: KQuant) -> tuple[int, ...]:
    """What differs between the three codecs, as numbers that kernels are compiled for."""
    layout = kind.layout
    assert layout.dmin is not None
    sizes = layout.block_bytes, layout.d, layout.dmin, layout.group, kind.nmax, kind.levels
    return *sizes, *map(int, kind.capped), int(kind.absolute), int(kind.sigma_factor)


_GROUPS_2, _CODES_2 = _packers_of(Q2)
_GROUPS_4, _CODES_4 = _packers_of(Q4)
_GROUPS_5, _CODES_5 = _packers_of(Q5)
_OF_2, _OF_4, _OF_5 = map(_numbers_of, (Q2, Q4, Q5))


def _q2_k(x: Any, importance: Any, out: Any) -> None:
    spans = _SPANS_2 if importance is None else _WEIGHTED_2
    _quantize(x, importance, out, _OF_2, spans, _LEVELS_15, _GROUPS_2, _CODES_2)


def _q4_k(x: Any, importance: Any, out: Any) -> None:
    spans = _SPANS_4 if importance is None else _WEIGHTED_4
    _quantize(x, importance, out, _OF_4, spans, _LEVELS_63, _GROUPS_4, _CODES_4)


def _q5_k(x: Any, importance: Any, out: Any) -> None:
    spans = _SPANS_5 if importance is None else _WEIGHTED_5
    _quantize(x, importance, out, _OF_5, spans, _LEVELS_63, _GROUPS_5, _CODES_5)


@inlined
def _quantize(
    x: Any,
    importance: Any,
    out: Any,
    numbers: Any,
    spans: Any,
    level_spans: Any,
    pack_groups: Any,
    pack_codes: Any,
) -> None:
    size, d_at, dmin_at, group, nmax, levels, capped_plain, capped_weighted, absolute, sigma_factor = numbers
    groups = BLOCK // group
    capped = capped_plain if importance is None else capped_weighted
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, trial, packed = scratch(BLOCK), scratch(BLOCK), scratch(group), byte_scratch(size)
    scales, minima, inverses, origins = scratch(groups), scratch(groups), scratch(groups), scratch(groups)
    scale_codes, minimum_codes, group_weights = scratch(groups), scratch(groups), scratch(groups)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        if importance is None:
            _plain_weights(tile, group, absolute, w)
        else:
            block_starts(first, n_blocks, x.shape[1] // BLOCK, BLOCK, starts)
            read(importance, starts, BLOCK, w)
            weigh(tile, BLOCK, square_sum(tile, BLOCK) * sigma_factor / float(BLOCK), w)
        for g in range(groups):
            at = g * group
            by_magnitude = importance is None and absolute
            scale, low, inverse, origin = fit_qkx(tile, at, group, nmax, spans, by_magnitude, w, at, trial)
            store(scales, g, scale)
            store(minima, g, negative(low))
            store(inverses, g, inverse)
            store(origins, g, origin)
        if importance is None:
            d = _code(scales, groups, levels, scale_codes)
            dmin = _code(minima, groups, levels, minimum_codes)
        else:
            for g in range(groups):
                total = floats(0)
                for i in range(g * group, g * group + group):
                    total = total + load(w, i)
                store(group_weights, g, total)
            d = fit_qp(scales, groups, levels, level_spans, group_weights, scale_codes)
            dmin = fit_qp(minima, groups, levels, level_spans, group_weights, minimum_codes)
        half_d, half_dmin = to_half(d), to_half(dmin)
        d, dmin = from_half(half_d), from_half(half_dmin)
        if capped:
            for g in range(groups):
                store(scale_codes, g, to_floats(at_most(to_ints(load(scale_codes, g)), levels)))
                store(minimum_codes, g, to_floats(at_most(to_ints(load(minimum_codes, g)), levels)))
        # Codes follow the scales and minima that a reader finds in the bytes.
        pack_groups(scale_codes, minimum_codes, packed)
        for g in range(groups):
            step = d * load(scale_codes, g)
            low = dmin * load(minimum_codes, g)
            _requantize(tile, g * group, group, nmax, step, low, load(inverses, g), load(origins, g))
        store_half(packed, d_at, half_d)
        store_half(packed, dmin_at, half_dmin)
        pack_codes(tile, packed)
        block_starts(first, n_blocks, n_blocks, size, starts)
        write(packed, size, out, starts)


@inlined
def _plain_weights(tile: Any, group: int, absolute: bool, w: Any) -> None:
    for at in range(0, BLOCK, group):
        total = floats(0)
        if not absolute:
            for i in range(at, at + group):
                total = total + load(tile, i) * load(tile, i)
            total = square_root(total / float(group))
        for i in range(at, at + group):
            store(w, i, magnitude(load(tile, i)) if absolute else total + magnitude(load(tile, i)))


@inlined
def _code(values: Any, groups: int, levels: int, codes: Any) -> Any:
    """Codes of the values as multiples of what is returned; see ``q2_q4_q5_k``."""
    greatest = floats(0)
    for g in range(groups):
        greatest = where(load(values, g) > greatest, load(values, g), greatest)
    inverse = where(greatest > 0, float(levels) / greatest, 0)
    for g in range(groups):
        code = nearest_int(inverse * load(values, g)) & 255
        store(codes, g, to_floats(where(greatest > 0, code, 0)))
    return greatest / float(levels)


@inlined
def _requantize(
    tile: Any, at: int, group: int, nmax: int, step: Any, low: Any, inverse: Any, origin: Any
) -> None:
    """Integers against the codes as stored, in place of the values; lanes without a step keep the old."""
    vanished = step == 0
    keeps = any_lane(vanished)
    for i in range(at, at + group):
        value = load(tile, i)
        q = nearest_clipped((value + low) / step, 0, nmax)
        if keeps:
            q = where(vanished, nearest_clipped(inverse * (value - origin), 0, nmax), q)
        store(tile, i, q)


KERNELS = {"q2_k": _q2_k, "q4_k": _q4_k, "q5_k": _q5_k}
