"""Q3_K and Q6_K on lanes: the compiled version of ``q3_q6_k``, a block of 256 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import (
    from_half,
    largest,
    nearest_clipped,
    nearest_int,
    store_half,
    to_half,
)
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    any_lane,
    at_least,
    at_most,
    floats,
    load,
    magnitude,
    store,
    to_floats,
    where,
)
from bamba_quant.codecs.compiled.packing import packers
from bamba_quant.codecs.compiled.search import fit_q3, fit_qx, square_sum, weigh
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.q3_q6_k import BLOCK, GROUP, GROUPS, Q3, Q6
from bamba_quant.codecs.search import GROUP_MAX_EPS, spans_around

_SPANS_4, _SPANS_32 = spans_around(4, 9), spans_around(32, 9)
Q3_BYTES, Q3_D, Q6_BYTES, Q6_D = Q3.block_bytes, Q3.d, Q6.block_bytes, Q6.d
_PACK_SCALES_3, _PACK_3 = packers(Q3.scales, Q3.codes)
_PACK_SCALES_6, _PACK_6 = packers(Q6.scales, Q6.codes)


def _q3_k(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, L, packed = scratch(BLOCK), scratch(BLOCK), scratch(BLOCK), byte_scratch(Q3_BYTES)
    scales, group_weights, codes = scratch(GROUPS), scratch(GROUPS), scratch(GROUPS)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        if importance is None:
            fit_q3(tile, GROUPS, GROUP, 4, L, scales)
            greatest = largest(scales, 0, GROUPS)
            inverse = -32.0 / greatest
            d = where(greatest != 0, 1 / inverse, 0)
            for g in range(GROUPS):
                # The integer passes through an int8 before it is clipped.
                code = (nearest_int(inverse * load(scales, g)) << 24) >> 24
                code = at_least(at_most(code, 31), -32) + 32
                store(codes, g, to_floats(where(greatest != 0, code, 0)))
        else:
            block_starts(first, n_blocks, x.shape[1] // BLOCK, BLOCK, starts)
            read(importance, starts, BLOCK, w)
            weigh(tile, BLOCK, square_sum(tile, BLOCK) * 2 / float(BLOCK), w)
            for g in range(GROUPS):
                at = g * GROUP
                scale, inverse, tiny = fit_qx(tile, at, GROUP, 4, _SPANS_4, w, at)
                total = floats(0)
                for i in range(at, at + GROUP):
                    total = total + load(w, i)
                    q = nearest_clipped(inverse * load(tile, i), -4, 3) + 4
                    store(L, i, where(tiny, 0, q))
                store(scales, g, scale)
                store(group_weights, g, total)
            d, inverse, tiny = fit_qx(scales, 0, GROUPS, 32, _SPANS_32, group_weights, 0)
            for g in range(GROUPS):
                code = nearest_clipped(inverse * load(scales, g), -32, 31) + 32
                store(codes, g, where(tiny, 0, code))
        half = to_half(d)
        d = from_half(half)
        for g in range(GROUPS):
            _requantize(tile, g * GROUP, d * (load(codes, g) - 32), 4, L)
        _PACK_SCALES_3(codes, packed)
        _PACK_3(L, packed)
        store_half(packed, Q3_D, half)
        block_starts(first, n_blocks, n_blocks, Q3_BYTES, starts)
        write(packed, Q3_BYTES, out, starts)


def _q6_k(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, L, packed = scratch(BLOCK), scratch(BLOCK), scratch(BLOCK), byte_scratch(Q6_BYTES)
    scales, codes = scratch(GROUPS), scratch(GROUPS)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        if importance is None:
            for i in range(BLOCK):
                store(w, i, load(tile, i) * load(tile, i))
        else:
            block_starts(first, n_blocks, x.shape[1] // BLOCK, BLOCK, starts)
            read(importance, starts, BLOCK, w)
        for g in range(GROUPS):
            at = g * GROUP
            scale, inverse, tiny = fit_qx(tile, at, GROUP, 32, _SPANS_32, w, at)
            store(scales, g, scale)
            for i in range(at, at + GROUP):
                q = nearest_clipped(inverse * load(tile, i), -32, 31) + 32
                store(L, i, where(tiny, 0, q))
        greatest = largest(scales, 0, GROUPS)
        empty = magnitude(greatest) < GROUP_MAX_EPS
        inverse = -128.0 / greatest
        half = to_half(1 / inverse)
        d = from_half(half)
        for g in range(GROUPS):
            # The code wraps to an int8, whatever the search returned.
            code = (at_most(nearest_int(inverse * load(scales, g)), 127) << 24) >> 24
            _requantize(tile, g * GROUP, d * to_floats(code), 32, L)
            store(codes, g, to_floats(where(empty, 0, code)))
        if any_lane(empty):
            for i in range(BLOCK):
                store(L, i, where(empty, 0, load(L, i)))
        _PACK_SCALES_6(codes, packed)
        _PACK_6(L, packed)
        store_half(packed, Q6_D, where(empty, 0, half))
        block_starts(first, n_blocks, n_blocks, Q6_BYTES, starts)
        write(packed, Q6_BYTES, out, starts)


@inlined
def _requantize(tile: Any, at: int, step: Any, nmax: int, L: Any) -> None:
    """Integers against the scale as stored; a lane without a step keeps what the search left in L."""
    vanished = step == 0
    keeps = any_lane(vanished)
    for i in range(at, at + GROUP):
        q = nearest_clipped(load(tile, i) / step, -nmax, nmax - 1) + nmax
        if keeps:
            q = where(vanished, load(L, i), q)
        store(L, i, q)


KERNELS = {"q3_k": _q3_k, "q6_k": _q6_k}
