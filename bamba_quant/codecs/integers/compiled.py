"""Groups of integers on lanes, packed at once: the compiled version of ``integers.search.quantize``, a group a lane."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.compiled.arithmetic import nearest_int
from bamba_quant.codecs.compiled.compilation import compile_kernel, inlined
from bamba_quant.codecs.compiled.lanes import LANES, at_least, at_most, load, store, store_bytes
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.integers.compiled_search import FLOAT, INTEGER, ROWS_OF_BEST, SCALE, ZERO, ZEROS, fit
from bamba_quant.codecs.integers.grid import IntegerGrid, Zero, check_columns
from bamba_quant.codecs.integers.search import method_named, trials_of

_METHODS = {"rtn": 0, "mse": 1, "hqq": 2}

Quantize = Callable[[F32, "F32 | None"], tuple[U8, F32, F32]]


def quantizer(grid: IntegerGrid, method: str, offset: int) -> Quantize:
    """(x, importance) to packed integers (rows, columns·bits/8), scales and zeros (rows, columns / group).

    The bytes of ``integer_search.quantize`` and ``integers.pack``. Free of the interpreter lock; any number of threads.
    Raises ``FormatError`` as these do, and ``ValueError`` for an importance of other columns.
    """
    method_named(method)
    first, near = trials_of(grid)
    trials = np.concatenate((first, near)).reshape(-1)

    def quantize(x: F32, importance: F32 | None = None) -> tuple[U8, F32, F32]:
        rows, columns = x.shape
        check_columns(grid, columns)
        packed = np.empty((rows, columns * grid.bits // 8), np.uint8)
        scale, zero = (np.empty((rows, columns // grid.group), np.float32) for _ in range(2))
        x = np.require(x, np.float32, ["C", "A"])
        weights = room = None
        if importance is not None and method != "rtn":  # which has no errors to weigh
            weights = np.require(np.broadcast_to(importance, (columns,)), np.float32, ["C", "A"])
            room = np.empty((grid.group, LANES), np.float32)
        kernel = _compiled(grid.bits, grid.zero, method, weights is not None)
        parameters = scale.reshape(-1), zero.reshape(-1)
        kernel(x, weights, room, packed, *parameters, grid.group, offset, trials, first.size)
        return packed, scale, zero

    return quantize


@cache
def _compiled(bits: int, zero: Zero, method: str, weighted: bool) -> Any:
    rows = types.Array(types.float32, 2, "C", readonly=True)
    line = types.Array(types.float32, 1, "C", readonly=True)
    weights = (line, types.Array(types.float32, 2, "C")) if weighted else (types.none, types.none)
    packed, parameters = types.Array(types.uint8, 2, "C"), types.Array(types.float32, 1, "C")
    size = types.int64
    signature = types.void(rows, *weights, packed, parameters, parameters, size, size, line, size)
    zero_kind, effort = ZEROS[zero], _METHODS[method]

    def kernel(
        x: Any, weights: Any, room: Any, packed: Any, scales: Any, zeros: Any, n: Any, offset: Any, trials: Any,
        first: Any,
    ) -> None:  # fmt: skip
        _quantize(x, weights, room, packed, scales, zeros, bits, zero_kind, n, effort, offset, trials, first)

    return compile_kernel(kernel, signature)


@inlined
def _quantize(
    x: Any,
    importance: Any,
    w: Any,
    packed: Any,
    scales: Any,
    zeros: Any,
    bits: int,
    zero_kind: int,
    n: int,
    effort: int,
    offset: int,
    trials: Any,
    first_trials: int,
) -> None:
    n_groups, per_row, size = x.size // n, x.shape[1] // n, n * bits // 8
    starts = np.empty(LANES, np.intp)
    tile, codes, best = scratch(n), byte_scratch(size), scratch(ROWS_OF_BEST)
    for first in range(0, n_groups, LANES):
        _read_weights(importance, first, n_groups, per_row, n, starts, w)
        block_starts(first, n_groups, n_groups, n, starts)
        read(x, starts, n, tile)
        scale, zero = fit(tile, w, n, bits, zero_kind, effort, trials, first_trials, best)
        _pack(tile, n, bits, zero_kind, offset, scale, zero, codes)
        block_starts(first, n_groups, n_groups, size, starts)
        write(codes, size, packed, starts)
        store(best, SCALE, scale)
        store(best, ZERO, zero)
        for lane in range(min(LANES, n_groups - first)):
            scales[first + lane] = best[SCALE, lane]
            zeros[first + lane] = best[ZERO, lane]


@inlined
def _read_weights(
    importance: Any, first: int, n_groups: int, per_row: int, n: int, starts: Any, w: Any
) -> None:
    if importance is not None:
        block_starts(first, n_groups, per_row, n, starts)
        read(importance, starts, n, w)


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
    if zero_kind == FLOAT:
        return (value - zero) / scale
    if zero_kind == INTEGER:
        return value / scale + zero
    return value / scale
