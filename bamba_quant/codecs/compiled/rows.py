"""Rows as they are stored, dequantized and multiplied on the CPU by code for their codec (``unpacking``).

A product dequantizes four rows into a buffer that stays in the core's cache and writes nothing else but the result, so
that of few rows of activations it costs little more than reading the stored bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.codecs.compiled.compilation import compile_kernel, inlined
from bamba_quant.codecs.compiled.lanes import (
    BYTE,
    FLOAT,
    FLOATS,
    INT,
    LANES,
    floats,
    llvm_call,
    primitive,
    vector_of,
    vector_pointer,
)
from bamba_quant.codecs.compiled.unpacking import Unpacking, Use, unpacking
from bamba_reference.kernels.cpu.launch import share

_TOGETHER = 4  # rows that a product dequantizes together
_COLUMNS = 1024  # of these rows that are multiplied together: 16 KB, which the fastest cache holds
_LEAST_ROWS = 16  # of each thread
_BYTES, _INPUT = (types.Array(kind, 1, "C", readonly=True) for kind in (types.uint8, types.float32))
_OUTPUT, _SIZE = types.Array(types.float32, 1, "C"), types.int64
_SIGNATURE = types.void(_BYTES, *[_SIZE] * 5, _INPUT, _SIZE, _OUTPUT, *[_SIZE] * 3)
_NOTHING = np.empty(0, np.float32)

# By a number that tells them from each other: a kernel knows no more of its codec, so that it can be kept on disk.
_UNPACKINGS: dict[int, Unpacking] = {}


class RowKernels(NamedTuple):
    """How rows of a codec and a number of columns, uint8 (rows, ``row_bytes``), are read; arrays are contiguous."""

    number: int
    row: tuple[
        int, int, int, int, int
    ]  # bytes, columns, columns of a group, bytes before scales and before zeros

    def decode(self, raw: U8, out: F32) -> None:
        """The rows as float32 into out (rows, columns), on every thread."""
        self._run(raw, _NOTHING, 0, out)

    def product(self, raw: U8, x: F32) -> F32:
        """x (n, columns) times the matrix (rows, columns) transposed: (n, rows), on every thread."""
        out = np.empty((len(x), len(raw)), np.float32)
        self._run(raw, x, len(x), out)
        return out

    def _run(self, raw: U8, x: F32, count: int, out: F32) -> None:
        flat = (part.reshape(-1) for part in (raw, x, out))
        source, vectors, target = flat
        share(
            _kernel(self.number), source, *self.row, vectors, count, target, len(raw),
            count=len(raw), least=_LEAST_ROWS,
        )  # fmt: skip


def row_kernels(codec: BlockCodec, columns: int) -> RowKernels | None:
    """The kernels of a codec's rows, compiled when they are first used; None where numpy reads them."""
    found = unpacking(codec)
    packed = codec.packed
    if found is None or columns % LANES or (packed is not None and packed.group % LANES):
        return None
    number = int.from_bytes(hashlib.sha256(found.key.encode()).digest()[:7])
    _UNPACKINGS[number] = found
    places = (columns, 0, 0) if packed is None else (packed.group, packed.scales_at, packed.zeros_at)
    return RowKernels(number, (codec.row_bytes(columns), columns, *places))


@cache
def _kernel(number: int) -> Callable[..., None]:
    weights, n_bytes = _UNPACKINGS[number].weights, _UNPACKINGS[number].n_bytes

    def rows_by(
        raw: Any, row_bytes: int, n: int, group: int, scales: int, zeros: int,
        x: Any, count: int, out: Any, rows: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Products of rows start to stop with ``count`` vectors x: out (count, rows). Without x the rows themselves:
        out (rows, n).
        """
        for r in range(start, stop if count == 1 else start):
            total = floats(0)
            at = r * row_bytes
            scale, zero = at + scales, at + zeros
            for column in range(0, n, group):
                for j in range(column, min(n, column + group), weights):
                    total = _dot(number, raw, at, scale, zero, x, j, total)
                    at += n_bytes
                scale += 4
                zero += 4
            out[r] = _sum(total)
        if count == 1:
            return
        tile, sums = np.zeros(_TOGETHER * n, np.float32), np.empty(_TOGETHER, np.float32)
        for first in range(start, stop, _TOGETHER):
            some = min(_TOGETHER, stop - first)
            for i in range(some):
                target, o = (tile, i * n) if count else (out, (first + i) * n)
                at = (first + i) * row_bytes
                scale, zero = at + scales, at + zeros
                for column in range(0, n, group):
                    for j in range(column, min(n, column + group), weights):
                        _unpack(number, raw, at, scale, zero, target, o + j)
                        at += n_bytes
                    scale += 4
                    zero += 4
            for column in range(0, n, _COLUMNS):
                for m in range(count):
                    _dots(tile, n, column, min(n, column + _COLUMNS), x, m * n, sums)
                    for i in range(some):
                        place = m * rows + first + i
                        out[place] = sums[i] + (out[place] if column else np.float32(0))

    return compile_kernel(rows_by, _SIGNATURE)


@inlined
def _dots(tile: Any, n: int, start: int, stop: int, x: Any, x0: int, sums: Any) -> None:
    """The products of columns of four rows of a tile with those of x[x0], …: sixteen sums each, added up at the end."""
    a, b, c, d = floats(0), floats(0), floats(0), floats(0)
    for i in range(start, stop, LANES):
        v = _at(x, x0 + i)
        a = _multiply_add(_at(tile, i), v, a)
        b = _multiply_add(_at(tile, n + i), v, b)
        c = _multiply_add(_at(tile, 2 * n + i), v, c)
        d = _multiply_add(_at(tile, 3 * n + i), v, d)
    sums[0], sums[1], sums[2], sums[3] = _sum(a), _sum(b), _sum(c), _sum(d)


@primitive
def _unpack(
    typing_context: Any, number: Any, raw: Any, at: Any, scale: Any, zero: Any, out: Any, o: Any
) -> Any:
    """The weights to out[o], …"""
    if not isinstance(number, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        def use(weights: Any, j: int) -> None:
            place = builder.add(args[6], ir.Constant(args[6].type, j))
            builder.store(
                weights, vector_pointer(context, builder, args[5], out, place, weights.type), align=4
            )

        _emit(context, builder, call, args, use)
        return context.get_dummy_value()

    return types.void(number, raw, *[_SIZE] * 3, out, _SIZE), generate


@primitive
def _dot(
    typing_context: Any, number: Any, raw: Any, at: Any, scale: Any, zero: Any, x: Any, i: Any, total: Any
) -> Any:
    """``total`` and the products of the weights with x[i], …"""
    if not isinstance(number, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        sums = [args[7]]  # of two, which do not wait for each other

        def use(weights: Any, j: int) -> None:
            place = builder.add(args[6], ir.Constant(args[6].type, j))
            v = builder.load(vector_pointer(context, builder, args[5], x, place, weights.type), align=4)
            if j == LANES:
                sums.append(builder.fmul(weights, v))
            else:
                which = j // LANES % 2
                sums[which] = llvm_call(builder, "fmuladd", weights, v, sums[which])

        _emit(context, builder, call, args, use)
        return sums[0] if len(sums) == 1 else builder.fadd(*sums)

    return FLOATS(number, raw, *[_SIZE] * 3, x, _SIZE, total), generate


def _emit(context: Any, builder: Any, call: Any, args: tuple[Any, ...], use: Use) -> None:
    """The code of ``_UNPACKINGS[number]`` for (number, raw, at, scale, zero, …)."""
    number, raw = call.args[:2]
    source = context.make_array(raw)(context, builder, args[1]).data
    places = [builder.bitcast(builder.gep(source, [arg]), BYTE.as_pointer()) for arg in args[2:5]]
    _UNPACKINGS[number.literal_value].emit(builder, places[0], places[1], places[2], use)


@primitive
def _at(typing_context: Any, x: Any, i: Any) -> Any:
    """Sixteen floats from x[i] on."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        pointer = vector_pointer(context, builder, args[0], x, args[1], vector_of(FLOAT))
        return builder.load(pointer, align=4)

    return FLOATS(x, _SIZE), generate


@primitive
def _multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once on processors that do so."""
    return FLOATS(a, b, c), lambda context, builder, call, args: llvm_call(builder, "fmuladd", *args)


@primitive
def _sum(typing_context: Any, v: Any) -> Any:
    """The sum of a vector's lanes: halves are added until one is left."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        value, count = args[0], LANES
        while count > 1:
            count //= 2
            low, high = (
                ir.Constant(ir.VectorType(INT, count), list(range(start, start + count)))
                for start in (0, count)
            )
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in (low, high)))
        return builder.extract_element(value, ir.Constant(INT, 0))

    return types.float32(v), generate
