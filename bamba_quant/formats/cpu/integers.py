"""Groups of integers on lanes, packed as they are made: the twin of ``formats.integers``, a lane a group."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from bamba_quant.formats.base import F32, U8
from bamba_quant.formats.cpu.arithmetic import nearest_clipped, nearest_int
from bamba_quant.formats.cpu.compilation import inlined, machine_code
from bamba_quant.formats.cpu.lanes import (
    LANES,
    at_least,
    at_most,
    bits_of,
    floats,
    from_bits,
    load,
    negative,
    store,
    store_bytes,
    where,
)
from bamba_quant.formats.cpu.tiles import byte_scratch, places, read, scratch, write
from bamba_quant.formats.integers import (
    EPSILON,
    RANGE_TRIALS,
    REFITS,
    START_TRIALS,
    SYMMETRIC_TRIALS,
    Grid,
    Zero,
    check_columns,
    method_named,
)

# Kinds of zero, as numbers: numba compiles a kernel for each and leaves the other branches out.
_NONE, _INTEGER, _FLOAT = range(3)
_ZEROS = {"none": _NONE, "integer": _INTEGER, "float": _FLOAT}
_METHODS = {"rtn": 0, "mse": 1, "hqq": 2}

Quantize = Callable[[F32, "F32 | None"], tuple[U8, F32, F32]]


def quantizer(grid: Grid, method: str, offset: int) -> Quantize:
    """(x, importance) to packed integers (rows, columns·bits/8), scales and zeros (rows, columns / group).

    The bytes of ``integers.quantize`` and ``integers.pack``. Free of the interpreter lock; any number of threads.
    """
    method_named(method)
    kernel, spans = _compiled(grid.bits, grid.zero, method), _fractions(grid, method)

    def quantize(x: F32, importance: F32 | None = None) -> tuple[U8, F32, F32]:
        rows, columns = x.shape
        check_columns(grid, columns)
        packed = np.empty((rows, columns * grid.bits // 8), np.uint8)
        scale, zero = (np.empty((rows, columns // grid.group), np.float32) for _ in range(2))
        x = np.require(x, np.float32, ["C", "A"])
        weights = np.ones(columns, np.float32) if importance is None else importance
        weights = np.require(weights, np.float32, ["C", "A"])
        kernel(x, weights, packed, scale.reshape(-1), zero.reshape(-1), grid.group, offset, spans)
        return packed, scale, zero

    return quantize


@cache
def _compiled(bits: int, zero: Zero, method: str) -> Any:
    rows = types.Array(types.float32, 2, "C", readonly=True)
    importance = types.Array(types.float32, 1, "C", readonly=True)
    packed, parameters = types.Array(types.uint8, 2, "C"), types.Array(types.float32, 1, "C")
    sizes = types.int64, types.int64
    signature = types.void(rows, importance, packed, parameters, parameters, *sizes, importance)
    zero_kind, effort = _ZEROS[zero], _METHODS[method]

    def kernel(
        x: Any, weights: Any, packed: Any, scales: Any, zeros: Any, n: Any, offset: Any, spans: Any
    ) -> None:
        _quantize(x, weights, packed, scales, zeros, bits, zero_kind, n, effort, offset, spans)

    return machine_code(kernel, signature)


def _fractions(grid: Grid, method: str) -> F32:
    if grid.zero == "none":
        return grid.fractions(SYMMETRIC_TRIALS)
    return grid.fractions(START_TRIALS if method == "hqq" else RANGE_TRIALS)


@inlined
def _quantize(
    x: Any,
    importance: Any,
    packed: Any,
    scales: Any,
    zeros: Any,
    bits: int,
    zero_kind: int,
    n: int,
    effort: int,
    offset: int,
    spans: Any,
) -> None:
    n_groups, per_row, size = x.size // n, x.shape[1] // n, n * bits // 8
    starts = np.empty(LANES, np.intp)
    tile, w, codes, pair = scratch(n), scratch(n), byte_scratch(size), scratch(2)
    for first in range(0, n_groups, LANES):
        places(first, n_groups, n_groups, n, starts)
        read(x, starts, n, tile)
        if effort > 0:
            places(first, n_groups, per_row, n, starts)
            read(importance, starts, n, w)
        scale, zero = _fit(tile, w, n, bits, zero_kind, effort, spans)
        _pack(tile, n, bits, zero_kind, offset, scale, zero, codes)
        places(first, n_groups, n_groups, size, starts)
        write(codes, size, packed, starts)
        store(pair, 0, scale)
        store(pair, 1, zero)
        for lane in range(min(LANES, n_groups - first)):
            scales[first + lane] = pair[0, lane]
            zeros[first + lane] = pair[1, lane]


@inlined
def _pack(
    tile: Any, n: int, bits: int, zero_kind: int, offset: int, scale: Any, zero: Any, codes: Any
) -> None:
    """The integers of a tile, by true quotients, plus ``offset``, as bytes or pairs of nibbles."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if bits == 8:
        for i in range(n):
            q = _divided(load(tile, i), scale, zero, zero_kind)
            store_bytes(codes, i, at_least(at_most(nearest_int(q), high), low) + offset)
    else:
        for i in range(n // 2):
            even = _divided(load(tile, 2 * i), scale, zero, zero_kind)
            odd = _divided(load(tile, 2 * i + 1), scale, zero, zero_kind)
            even_code = at_least(at_most(nearest_int(even), high), low) + offset
            odd_code = at_least(at_most(nearest_int(odd), high), low) + offset
            store_bytes(codes, i, (even_code & 15) | ((odd_code & 15) << 4))


@inlined
def _divided(value: Any, scale: Any, zero: Any, zero_kind: int) -> Any:
    if zero_kind == _FLOAT:
        return (value - zero) / scale
    if zero_kind == _INTEGER:
        return value / scale + zero
    return value / scale


@inlined
def _multiplied(value: Any, inverse: Any, zero: Any, zero_kind: int) -> Any:
    if zero_kind == _FLOAT:
        return (value - zero) * inverse
    if zero_kind == _INTEGER:
        return value * inverse + zero
    return value * inverse


@inlined
def _stands_for(q: Any, scale: Any, zero: Any, zero_kind: int) -> Any:
    if zero_kind == _FLOAT:
        return scale * q + zero
    if zero_kind == _INTEGER:
        return scale * (q - zero)
    return scale * q


@inlined
def bfloat16(v: Any) -> Any:
    """The nearest bfloat16 of numbers that are none, half to even."""
    bits = bits_of(v)
    return from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)


@inlined
def _usable(scale: Any) -> Any:
    return where(scale == 0, EPSILON, scale)


@inlined
def _span(low: Any, high: Any, bits: int, zero_kind: int) -> Any:
    """``integers.span``."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    exact = (high - low) / float(highest - lowest)
    scale = _usable(bfloat16(exact))
    if zero_kind == _FLOAT:
        return scale, bfloat16(low - scale * float(lowest))
    zero = floats(lowest) - low / exact
    zero = where(zero < lowest, lowest, zero)
    zero = where(zero > highest, highest, zero)
    return scale, where(exact == 0, 0, nearest_clipped(zero, lowest, highest))


@inlined
def _fit(tile: Any, w: Any, n: int, bits: int, zero_kind: int, effort: int, spans: Any) -> Any:
    """Scale and zero of each lane: ``rtn`` for effort 0, ``mse`` for 1, ``hqq`` for 2."""
    low = load(tile, 0)
    high = low
    for i in range(1, n):
        value = load(tile, i)
        low, high = where(value < low, value, low), where(value > high, value, high)
    if zero_kind == _INTEGER:
        low, high = where(low > 0, 0, low), where(high < 0, 0, high)
    greatest = where(negative(low) > high, negative(low), high)
    zero = floats(0)
    if zero_kind == _NONE:
        scale = _usable(bfloat16(greatest / (((1 << bits) - 1) / 2)))
    else:
        scale, zero = _span(low, high, bits, zero_kind)
    if effort == 0:
        return scale, zero
    error = _error(tile, w, n, bits, zero_kind, scale, zero)
    if zero_kind == _NONE:
        widest = greatest / float(1 << (bits - 1))
        for i in range(spans.size):
            trial = bfloat16(widest * spans[i])
            scale, zero, error = _consider(tile, w, n, bits, zero_kind, trial, floats(0), scale, zero, error)
            if effort == 2:
                scale, zero, error = _consider(
                    tile, w, n, bits, zero_kind, negative(trial), floats(0), scale, zero, error
                )
    else:
        for i in range(spans.size):
            for j in range(spans.size):
                trial, trial_zero = _span(low * spans[i], high * spans[j], bits, zero_kind)
                scale, zero, error = _consider(
                    tile, w, n, bits, zero_kind, trial, trial_zero, scale, zero, error
                )
    if effort == 2:
        for _ in range(REFITS):
            trial, trial_zero = _refit(tile, w, n, bits, zero_kind, scale, zero)
            scale, zero, error = _consider(tile, w, n, bits, zero_kind, trial, trial_zero, scale, zero, error)
    return scale, zero


@inlined
def _consider(
    tile: Any,
    w: Any,
    n: int,
    bits: int,
    zero_kind: int,
    trial: Any,
    trial_zero: Any,
    scale: Any,
    zero: Any,
    error: Any,
) -> Any:
    trial_error = _error(tile, w, n, bits, zero_kind, trial, trial_zero)
    better = (trial_error < error) & ((trial != 0) if zero_kind == _NONE else (trial > 0))
    return where(better, trial, scale), where(better, trial_zero, zero), where(better, trial_error, error)


@inlined
def _error(tile: Any, w: Any, n: int, bits: int, zero_kind: int, scale: Any, zero: Any) -> Any:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inverse = 1 / scale
    total = floats(0)
    for i in range(n):
        value = load(tile, i)
        q = nearest_clipped(_multiplied(value, inverse, zero, zero_kind), low, high)
        difference = _stands_for(q, scale, zero, zero_kind) - value
        total = total + load(w, i) * (difference * difference)
    return total


@inlined
def _refit(tile: Any, w: Any, n: int, bits: int, zero_kind: int, scale: Any, zero: Any) -> Any:
    """``integers._refit``."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inverse = 1 / scale
    sum_qq, sum_qx, sum_w, sum_q, sum_x = floats(0), floats(0), floats(0), floats(0), floats(0)
    for i in range(n):
        value, weight = load(tile, i), load(w, i)
        q = nearest_clipped(_multiplied(value, inverse, zero, zero_kind), low, high)
        if zero_kind == _INTEGER:
            q = q - zero
        wq = weight * q
        sum_qq = sum_qq + wq * q
        sum_qx = sum_qx + wq * value
        if zero_kind == _FLOAT:
            sum_w = sum_w + weight
            sum_q = sum_q + wq
            sum_x = sum_x + weight * value
    if zero_kind != _FLOAT:
        return bfloat16(sum_qx / sum_qq), zero
    trial = bfloat16((sum_w * sum_qx - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q))
    return trial, bfloat16((sum_x - trial * sum_q) / sum_w)
