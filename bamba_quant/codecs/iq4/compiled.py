"""IQ4_NL and IQ4_XS on lanes: the compiled version of ``iq4``, a block of 32 or 256 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import largest, nearest_clipped, reciprocal, store_half, to_half
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    floats,
    load,
    magnitude,
    negative,
    store,
    where,
)
from bamba_quant.codecs.compiled.packing import packers
from bamba_quant.codecs.compiled.search import square_sum, weigh
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.iq4 import GROUP, GROUPS, MIDPOINTS, NL, SUPERBLOCK, TRIES, VALUES, XS
from bamba_quant.codecs.search import GROUP_MAX_EPS

_GAPS = np.diff(VALUES)
_TRIED = np.arange(-TRIES, TRIES + 1, dtype=np.float32) + VALUES[0]
NL_BYTES, NL_D, XS_BYTES, XS_D = NL.block_bytes, NL.d, XS.block_bytes, XS.d
(_PACK_NL,) = packers(NL.codes)
_PACK_SCALES, _PACK_XS = packers(XS.scales, XS.codes)


def _iq4_nl(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // GROUP
    starts = np.empty(LANES, np.intp)
    tile, w, packed = scratch(GROUP), scratch(GROUP), byte_scratch(NL_BYTES)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, GROUP, starts)
        read(x, starts, GROUP, tile)
        _read_weights(importance, first, n_blocks, x.shape[1], GROUP, starts, tile, w)
        d = _fit_scale(tile, 0, w)
        _choose(tile, 0, reciprocal(d))
        store_half(packed, NL_D, to_half(d))
        _PACK_NL(tile, packed)
        block_starts(first, n_blocks, n_blocks, NL_BYTES, starts)
        write(packed, NL_BYTES, out, starts)


def _iq4_xs(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // SUPERBLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, packed = scratch(SUPERBLOCK), scratch(SUPERBLOCK), byte_scratch(XS_BYTES)
    scales, codes = scratch(GROUPS), scratch(GROUPS)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, SUPERBLOCK, starts)
        read(x, starts, SUPERBLOCK, tile)
        _read_weights(importance, first, n_blocks, x.shape[1], SUPERBLOCK, starts, tile, w)
        for g in range(GROUPS):
            store(scales, g, _fit_scale(tile, g * GROUP, w))
        d = negative(largest(scales, 0, GROUPS)) / 32
        inverse = reciprocal(d)
        for g in range(GROUPS):
            code = nearest_clipped(inverse * load(scales, g), -32, 31)
            store(codes, g, code + 32)
            _choose(tile, g * GROUP, reciprocal(d * code))
        store_half(packed, XS_D, to_half(d))
        _PACK_SCALES(codes, packed)
        _PACK_XS(tile, packed)
        block_starts(first, n_blocks, n_blocks, XS_BYTES, starts)
        write(packed, XS_BYTES, out, starts)


@inlined
def _read_weights(
    importance: Any, first: int, n_blocks: int, columns: int, size: int, starts: Any, tile: Any, w: Any
) -> None:
    if importance is None:
        for i in range(size):
            store(w, i, load(tile, i) * load(tile, i))
    else:
        block_starts(first, n_blocks, columns // size, size, starts)
        read(importance, starts, size, w)
        weigh(tile, size, square_sum(tile, size) * (2.0 / size), w)


@inlined
def _fit_scale(x: Any, at: int, w: Any) -> Any:
    greatest = largest(x, at, GROUP)
    sumqx, sumq2 = _sums(x, at, 1 / (negative(greatest) / VALUES[0]), w)
    d = where(sumq2 > 0, sumqx / sumq2, 0)
    best = d * sumqx
    for t in range(_TRIED.size):
        sumqx, sumq2 = _sums(x, at, floats(_TRIED[t]) / greatest, w)
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        d = where(better, sumqx / sumq2, d)
        best = where(better, d * sumqx, best)
    return where(magnitude(greatest) < GROUP_MAX_EPS, 0, d)


@inlined
def _sums(x: Any, at: int, inverse: Any, w: Any) -> Any:
    sumqx, sumq2 = floats(0), floats(0)
    for i in range(at, at + GROUP):
        value, weight = load(x, i), load(w, i)
        v = inverse * value
        q = floats(VALUES[0])
        for m in range(MIDPOINTS.size):
            q = where(v < MIDPOINTS[m], q, q + _GAPS[m])
        sumqx = sumqx + weight * q * value
        sumq2 = sumq2 + weight * q * q
    return sumqx, sumq2


@inlined
def _choose(tile: Any, at: int, inverse: Any) -> None:
    """Indices of the nearest table values, in place of the values."""
    for i in range(at, at + GROUP):
        v = inverse * load(tile, i)
        index = floats(0)
        for m in range(MIDPOINTS.size):
            index = where(v < MIDPOINTS[m], index, index + 1)
        store(tile, i, index)


KERNELS = {"iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs}
