"""Q4_0, Q4_1, Q5_0 and Q5_1 on lanes: the compiled version of ``q4_q5``, a block of 32 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import (
    largest,
    nearest_clipped,
    reciprocal,
    store_half,
    to_half,
    truncate,
)
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    at_most,
    load,
    store,
    to_floats,
    where,
)
from bamba_quant.codecs.compiled.packing import packers
from bamba_quant.codecs.compiled.search import fit_qkx, fit_qx, weigh
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.q4_q5 import BLOCK, layout_of, offset_grid
from bamba_quant.codecs.search import spans_around

_SPANS_8, _SPANS_16 = spans_around(8, 9), spans_around(16, 9)
_GRID_4, _GRID_5 = offset_grid(4).spans, offset_grid(5).spans
(_PACK_Q4_0,), (_PACK_Q5_0,) = (packers(layout_of(bits, offset=False).codes) for bits in (4, 5))
(_PACK_Q4_1,), (_PACK_Q5_1,) = (packers(layout_of(bits, offset=True).codes) for bits in (4, 5))


def _q4_0(x: Any, importance: Any, out: Any) -> None:
    _quantize(x, importance, out, 4, False, 18, _SPANS_8, _PACK_Q4_0)


def _q5_0(x: Any, importance: Any, out: Any) -> None:
    _quantize(x, importance, out, 5, False, 22, _SPANS_16, _PACK_Q5_0)


def _q4_1(x: Any, importance: Any, out: Any) -> None:
    _quantize(x, importance, out, 4, True, 20, _GRID_4, _PACK_Q4_1)


def _q5_1(x: Any, importance: Any, out: Any) -> None:
    _quantize(x, importance, out, 5, True, 24, _GRID_5, _PACK_Q5_1)


@inlined
def _quantize(
    x: Any, importance: Any, out: Any, bits: int, offset: bool, size: int, spans: Any, pack: Any
) -> None:
    n_blocks, per_row = x.size // BLOCK, x.shape[1] // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, w, trial, packed = scratch(BLOCK), scratch(BLOCK), scratch(BLOCK), byte_scratch(size)
    sigma2 = np.empty((1, LANES), np.float32)
    sigma2_of_rows = np.empty(0 if importance is None else len(x), np.float32)
    if importance is not None:
        _mean_squares(x, sigma2_of_rows)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        if importance is not None:
            block_starts(first, n_blocks, per_row, BLOCK, starts)
            read(importance, starts, BLOCK, w)
            for lane in range(LANES):
                sigma2[0, lane] = sigma2_of_rows[min(first + lane, n_blocks - 1) // per_row]
            weigh(tile, BLOCK, load(sigma2, 0), w)
        if offset:
            d, m = _offset(tile, importance, w, bits, spans, trial)
            store_half(packed, 2, to_half(m))
        else:
            d = _signed(tile, importance, w, bits, spans)
        store_half(packed, 0, to_half(d))
        pack(tile, packed)
        block_starts(first, n_blocks, n_blocks, size, starts)
        write(packed, size, out, starts)


@inlined
def _mean_squares(x: Any, sigma2: Any) -> None:
    """The mean square of every row, summed serially."""
    n = np.float32(x.shape[1])
    for row in range(len(x)):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        sigma2[row] = total / n


@inlined
def _signed(tile: Any, importance: Any, w: Any, bits: int, spans: Any) -> Any:
    """The scale of each lane; its integers replace the values."""
    nmax = 1 << (bits - 1)
    if importance is None:
        d = largest(tile, 0, BLOCK) / float(-nmax)
        inverse = reciprocal(d)
        for i in range(BLOCK):
            q = truncate(load(tile, i) * inverse + (nmax + 0.5))
            store(tile, i, _as_byte(q, 2 * nmax - 1))
    else:
        d, inverse, tiny = fit_qx(tile, 0, BLOCK, nmax, spans, w, 0)
        for i in range(BLOCK):
            q = nearest_clipped(inverse * load(tile, i), -nmax, nmax - 1) + nmax
            store(tile, i, where(tiny, 0, q))
    return d


@inlined
def _offset(tile: Any, importance: Any, w: Any, bits: int, spans: Any, trial: Any) -> Any:
    """The scale and the minimum of each lane; its integers replace the values."""
    nmax = (1 << bits) - 1
    if importance is None:
        m = load(tile, 0)
        high = m
        for i in range(1, BLOCK):
            m = where(load(tile, i) < m, load(tile, i), m)
            high = where(load(tile, i) > high, load(tile, i), high)
        d = (high - m) / float(nmax)
        inverse = reciprocal(d)
        for i in range(BLOCK):
            store(tile, i, _as_byte(truncate((load(tile, i) - m) * inverse + 0.5), nmax))
    else:
        d, m, inverse, origin = fit_qkx(tile, 0, BLOCK, nmax, spans, False, w, 0, trial)
        for i in range(BLOCK):
            store(tile, i, nearest_clipped(inverse * (load(tile, i) - origin), 0, nmax))
    return d, m


@inlined
def _as_byte(q: Any, greatest: int) -> Any:
    """An integer wrapped to an int8, at most ``greatest``, as a uint8."""
    return to_floats(at_most((q << 24) >> 24, greatest) & 255)


KERNELS = {"q4_0": _q4_0, "q5_0": _q5_0, "q4_1": _q4_1, "q5_1": _q5_1}
