"""FP4 on lanes: the compiled version of ``fp4.encode``, a block a lane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.compiled.arithmetic import nearest_int
from bamba_quant.codecs.compiled.compilation import compile_kernel, inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    bits_of,
    floats,
    load,
    magnitude,
    store,
    store_bytes,
    to_floats,
    to_ints,
    where,
)
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch

if TYPE_CHECKING:
    from bamba_quant.codecs.fp4 import Scheme

_ROWS = types.Array(types.float32, 2, "C", readonly=True)
_LINE = types.Array(types.float32, 1, "C", readonly=True)
_OFFSETS = types.Array(types.int64, 1, "C", readonly=True)
_BASE = types.Array(types.uint8, 1, "C", readonly=True)
_BYTES, _CHOSEN = types.Array(types.uint8, 2, "C"), types.Array(types.uint8, 1, "C")
_SIZE = types.int64


def encode(
    x: F32, importance: F32 | None, steps: F32, base: U8, scheme: Scheme, offsets: tuple[int, ...]
) -> tuple[U8, U8]:
    """``fp4.encode``; free of the interpreter lock."""
    x = np.require(x, np.float32, ["C", "A"])
    packed, chosen = np.empty((len(x), x.shape[1] // 2), np.uint8), np.array(base)
    weights = None if importance is None else np.require(importance, np.float32, ["C", "A"])
    signature = types.void(
        _ROWS,
        types.none if weights is None else _LINE,
        _LINE,
        _BASE,
        _SIZE,
        _SIZE,
        _SIZE,
        _OFFSETS,
        _BYTES,
        _CHOSEN,
    )
    # One offset leaves nothing to choose.
    tried = np.array(offsets if len(offsets) > 1 else (), np.int64)
    compile_kernel(_encode, signature)(
        x,
        weights,
        steps,
        base.reshape(-1),
        scheme.block,
        scheme.low,
        scheme.high,
        tried,
        packed.reshape(-1, scheme.block // 2),
        chosen.reshape(-1),
    )
    return packed, chosen


def _encode(
    x: Any,
    importance: Any,
    steps: Any,
    base: Any,
    n: int,
    low: int,
    high: int,
    offsets: Any,
    packed: Any,
    chosen: Any,
) -> None:
    n_blocks, per_row = base.size, x.shape[1] // n
    starts = np.empty(LANES, np.intp)
    tile, weights, step, codes = scratch(n), scratch(n), scratch(3), byte_scratch(n // 2)
    for first in range(0, n_blocks, LANES):
        if importance is not None:
            block_starts(first, n_blocks, per_row, n, starts)
            read(importance, starts, n, weights)
        block_starts(first, n_blocks, n_blocks, n, starts)
        read(x, starts, n, tile)
        for lane in range(LANES):
            step[2, lane] = base[min(first + lane, n_blocks - 1)]
        best, found = floats(np.inf), load(step, 2)
        for offset in offsets:
            for lane in range(LANES):
                start = np.int64(base[min(first + lane, n_blocks - 1)])
                tried = min(max(start + offset, low), high)
                step[0, lane] = steps[tried]
                step[1, lane] = steps[tried] / steps[start]
                step[2, lane] = tried
            d, ratio, error = load(step, 0), load(step, 1), floats(0)
            for i in range(n):
                size = magnitude(load(tile, i)) / d
                rest = size - _nearest(size)[1]
                rest = rest * rest
                if importance is not None:
                    rest = rest * load(weights, i)
                error = error + rest
            error = error * (ratio * ratio)
            better = error < best
            best = where(better, error, best)
            found = where(better, load(step, 2), found)
        store(step, 2, found)
        for lane in range(LANES):
            code = np.int64(step[2, lane])
            step[0, lane] = steps[code]
            if first + lane < n_blocks:
                chosen[first + lane] = code
        d = load(step, 0)
        for i in range(n // 2):
            even, odd = _code(load(tile, 2 * i), d), _code(load(tile, 2 * i + 1), d)
            store_bytes(codes, i, even | (odd << 4))
        for lane in range(min(LANES, n_blocks - first)):
            for i in range(n // 2):
                packed[first + lane, i] = codes[i, lane]


@inlined
def _code(value: Any, d: Any) -> Any:
    return _nearest(magnitude(value) / d)[0] | ((bits_of(value) >> 28) & 8)


@inlined
def _nearest(size: Any) -> Any:
    """``fp4.nearest``."""
    capped = where(size < 6, size, 6)
    spacing = where(capped < 2, floats(0.5), where(capped < 4, floats(1), floats(2)))
    whole = nearest_int(capped / spacing)
    above = where(capped < 2, floats(0), where(capped < 4, floats(2), floats(4)))
    return whole + to_ints(above), to_floats(whole) * spacing
