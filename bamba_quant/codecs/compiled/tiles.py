"""Sixteen blocks at a time between memory and lanes: row i of a tile holds element i of each block."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import BYTE, FLOAT, LANES, primitive, vector_of, vector_pointer
from bamba_reference.runtime.jit import transposed

_INDEX = ir.IntType(64)


def _addresses(
    context: Any,
    builder: Any,
    array: Any,
    array_type: Any,
    starts: Any,
    starts_type: Any,
    offset: Any,
    vector: Any,
) -> list[Any]:
    """The addresses ``starts[lane] + offset`` in an array."""
    first = context.make_array(starts_type)(context, builder, starts).data
    indices = [builder.load(builder.gep(first, [ir.Constant(_INDEX, lane)])) for lane in range(LANES)]
    return [
        vector_pointer(context, builder, array, array_type, builder.add(index, offset), vector)
        for index in indices
    ]


def _rows(context: Any, builder: Any, tile: Any, tile_type: Any, row: Any, vector: Any) -> list[Any]:
    """The addresses of sixteen successive rows of a tile."""
    indices = [
        builder.mul(builder.add(row, ir.Constant(_INDEX, i)), ir.Constant(_INDEX, LANES))
        for i in range(LANES)
    ]
    return [vector_pointer(context, builder, tile, tile_type, index, vector) for index in indices]


def _move(builder: Any, sources: list[Any], targets: list[Any], align: int) -> None:
    rows = transposed(builder, [builder.load(source, align=align) for source in sources])
    for row, target in zip(rows, targets, strict=True):
        builder.store(row, target, align=align)


@primitive
def _read_square(
    typing_context: Any,
    array: types.Type,
    starts: types.Type,
    offset: types.Type,
    tile: types.Type,
    row: types.Type,
) -> Any:
    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        vector = vector_of(FLOAT)
        sources = _addresses(context, builder, args[0], call.args[0], args[1], call.args[1], args[2], vector)
        _move(builder, sources, _rows(context, builder, args[3], call.args[3], args[4], vector), align=4)
        return context.get_dummy_value()

    return types.void(array, starts, types.intp, tile, types.intp), generate


@primitive
def _write_square(
    typing_context: Any,
    tile: types.Type,
    row: types.Type,
    array: types.Type,
    starts: types.Type,
    offset: types.Type,
) -> Any:
    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        vector = vector_of(BYTE)
        targets = _addresses(context, builder, args[2], call.args[2], args[3], call.args[3], args[4], vector)
        _move(builder, _rows(context, builder, args[0], call.args[0], args[1], vector), targets, align=1)
        return context.get_dummy_value()

    return types.void(tile, types.intp, array, starts, types.intp), generate


@inlined
def scratch(rows: int) -> Any:
    """Scratch for ``rows`` vectors of floats."""
    return np.empty((rows, LANES), np.float32)


@inlined
def byte_scratch(rows: int) -> Any:
    """Scratch for ``rows`` vectors of bytes."""
    return np.empty((rows, LANES), np.uint8)


@inlined
def word_scratch(rows: int) -> Any:
    """Scratch for ``rows`` vectors of sixteen bits."""
    return np.empty((rows, LANES), np.uint16)


@inlined
def block_starts(first: int, n_blocks: int, period: int, size: int, starts: Any) -> None:
    """Offsets of blocks ``first`` … ``first`` + 15, modulo ``period``, of ``size`` elements each.

    Past the end lanes repeat the last block: they read what it reads and write the same bytes over its own.
    """
    for lane in range(LANES):
        starts[lane] = min(first + lane, n_blocks - 1) % period * size


@inlined
def read(array: Any, starts: Any, size: int, tile: Any) -> None:
    """``size`` floats, a multiple of 16, of each of sixteen blocks into a tile."""
    for i in range(0, size, LANES):
        _read_square(array, starts, i, tile, i)


@inlined
def write(tile: Any, size: int, array: Any, starts: Any) -> None:
    """``size`` bytes, at least 16, of each of sixteen blocks from a tile; the last square may overlap."""
    for i in range(0, size - LANES + 1, LANES):
        _write_square(tile, i, array, starts, i)
    if size % LANES:
        _write_square(tile, size - LANES, array, starts, size - LANES)
