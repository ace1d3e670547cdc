"""Q2_K, Q4_K and Q5_K on lanes: the twins of ``bamba_quant.codecs.q2_q4_q5_k``, a lane a block of 256."""

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
    store_bytes,
    to_floats,
    to_ints,
    where,
)
from bamba_quant.codecs.compiled.packing import pack_bits, pack_nibbles, pack_two_bit_codes
from bamba_quant.codecs.compiled.search import fit_qkx, fit_qp, square_sum, weigh
from bamba_quant.codecs.compiled.tiles import byte_scratch, places, read, scratch, write
from bamba_quant.codecs.q2_q4_q5_k import BLOCK, Q2, Q4, Q5
from bamba_quant.codecs.search import spans_around

_SPANS_2, _SPANS_4, _SPANS_5 = Q2.plain.spans, Q4.plain.spans, Q5.plain.spans
_WEIGHTED_2, _WEIGHTED_4, _WEIGHTED_5 = Q2.weighted.spans, Q4.weighted.spans, Q5.weighted.spans
_LEVELS_15, _LEVELS_63 = spans_around(15, 4), spans_around(63, 4)


def _q2_k(x: Any, importance: Any, out: Any) -> None:
    _offset(x, importance, out, 2, 84, _SPANS_2 if importance is None else _WEIGHTED_2, _LEVELS_15)


def _q4_k(x: Any, importance: Any, out: Any) -> None:
    _offset(x, importance, out, 4, 144, _SPANS_4 if importance is None else _WEIGHTED_4, _LEVELS_63)


def _q5_k(x: Any, importance: Any, out: Any) -> None:
    _offset(x, importance, out, 5, 176, _SPANS_5 if importance is None else _WEIGHTED_5, _LEVELS_63)


@inlined
def _offset(x: Any, importance: Any, out: Any, bits: int, size: int, spans: Any, level_spans: Any) -> None:
    nmax = (1 << bits) - 1
    group = 16 if bits == 2 else 32
    groups = BLOCK // group
    levels = 15 if bits == 2 else 63
    capped = bits == 5 or (bits == 4 and importance is None)
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, trial, packed = scratch(BLOCK), scratch(BLOCK), scratch(group), byte_scratch(size)
    scales, minima, inverses, origins = scratch(groups), scratch(groups), scratch(groups), scratch(groups)
    scale_codes, minimum_codes, group_weights = scratch(groups), scratch(groups), scratch(groups)
    for first in range(0, n_blocks, LANES):
        places(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        if importance is None:
            _plain_weights(tile, group, bits == 2, w)
        else:
            places(first, n_blocks, x.shape[1] // BLOCK, BLOCK, starts)
            read(importance, starts, BLOCK, w)
            weigh(tile, BLOCK, square_sum(tile, BLOCK) * (1 if bits == 2 else 2) / float(BLOCK), w)
        for g in range(groups):
            at = g * group
            absolute = bits == 2 and importance is None
            scale, low, inverse, origin = fit_qkx(tile, at, group, nmax, spans, absolute, w, at, trial)
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
        _pack_codes(scale_codes, minimum_codes, capped, bits, packed)
        for g in range(groups):
            step = d * load(scale_codes, g)
            low = dmin * load(minimum_codes, g)
            _requantize(tile, g * group, group, nmax, step, low, load(inverses, g), load(origins, g))
        if bits == 2:
            pack_two_bit_codes(tile, 0, packed, 16)
            store_half(packed, 80, half_d)
            store_half(packed, 82, half_dmin)
        else:
            store_half(packed, 0, half_d)
            store_half(packed, 2, half_dmin)
            if bits == 5:
                pack_bits(tile, 4, packed, 16)
            pack_nibbles(tile, BLOCK, 64, packed, 48 if bits == 5 else 16)
        places(first, n_blocks, n_blocks, size, starts)
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
    """Codes of the values as multiples of what is returned; see ``bamba_quant.codecs.q2_q4_q5_k``."""
    greatest = floats(0)
    for g in range(groups):
        greatest = where(load(values, g) > greatest, load(values, g), greatest)
    inverse = where(greatest > 0, float(levels) / greatest, 0)
    for g in range(groups):
        code = nearest_int(inverse * load(values, g)) & 255
        store(codes, g, to_floats(where(greatest > 0, code, 0)))
    return greatest / float(levels)


@inlined
def _pack_codes(scales: Any, minima: Any, capped: bool, bits: int, packed: Any) -> None:
    """The codes' bytes; scales and minima become what a reader will see in them."""
    if bits == 2:
        for g in range(16):
            byte = (to_ints(load(scales, g)) | (to_ints(load(minima, g)) << 4)) & 255
            store_bytes(packed, g, byte)
            store(scales, g, to_floats(byte & 15))
            store(minima, g, to_floats(byte >> 4))
    else:
        for g in range(4):
            scale, high_scale = to_ints(load(scales, g)), to_ints(load(scales, g + 4))
            low, high_low = to_ints(load(minima, g)), to_ints(load(minima, g + 4))
            if capped:
                scale, high_scale = at_most(scale, 63), at_most(high_scale, 63)
                low, high_low = at_most(low, 63), at_most(high_low, 63)
            scale = (scale | ((high_scale >> 4) << 6)) & 255
            low = (low | ((high_low >> 4) << 6)) & 255
            store_bytes(packed, 4 + g, scale)
            store_bytes(packed, 8 + g, low)
            store_bytes(packed, 12 + g, (high_scale & 15) | ((high_low & 15) << 4))
            store(scales, g, to_floats(scale & 63))
            store(scales, g + 4, to_floats((high_scale & 15) | ((scale >> 6) << 4)))
            store(minima, g, to_floats(low & 63))
            store(minima, g + 4, to_floats((high_low & 15) | ((low >> 6) << 4)))


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
