"""Products of small tiles held in vector registers, and the rearrangement in memory that feeds them.

``multiply`` adds up a tile of ``ROWS`` rows by some vectors of the result in registers: every step loads the
vectors of one row of b and multiplies them by ``ROWS`` single numbers of a. With AVX-512 a tile of 8 × 48 needs
24 of 32 registers and loads 11 times for 24 operations, which keeps both of a Zen 5 core's units busy.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from bamba_reference.kernels.cpu.launch import has
from bamba_reference.runtime.jit import transposed

# Numbers in a register, rows of a tile, and the most vectors across it.
LANES, ROWS, VECTORS = (16, 8, 3) if has("avx512f") else (8, 4, 3) if has("avx2") else (4, 4, 3)
WIDTH = LANES * VECTORS
# Whether products of these tiles are faster than torch's: elsewhere LLVM does each fused operation by a call.
WIDE_TILES = LANES > 4 and has("fma")

_UNROLLED = 4
_FLOAT, _INT, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _number(value: int) -> ir.Constant:
    return ir.Constant(_SIZE, value)


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)


def _store(builder: Any, vector: Any, pointer: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)


def _repeated(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


def _multiply(vectors: int) -> Any:
    @intrinsic
    def function(
        typing: Any, a: Any, a0: Any, a_step: Any, b: Any, b0: Any, b_step: Any, c: Any, c0: Any, c_step: Any,
        terms: Any, kept: Any,
    ) -> Any:  # fmt: skip
        sizes = [types.int64] * 2

        def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
            at = [_at(context, builder, call.args[i], args[i], args[i + 1]) for i in (0, 3, 6)]
            _emit(builder, vectors, at, [args[i] for i in (2, 5, 8)], args[9], args[10])
            return context.get_dummy_value()

        return types.void(a, *sizes, b, *sizes, c, *sizes, types.int64, types.float32), generate

    return function


def _emit(builder: Any, vectors: int, at: list[Any], steps: list[Any], terms: Any, kept: Any) -> None:
    """c = kept * c + a b, where ``kept`` 0 means that c is not read."""
    function, before = builder.function, builder.basic_block
    four = builder.and_(terms, _number(-_UNROLLED))
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    state = (_number(0), at[0], at[1], [[zero] * vectors for _ in range(ROWS)])
    for unrolled, until in ((_UNROLLED, four), (1, terms)):
        check, body, after = (function.append_basic_block(name) for name in ("check", "body", "after"))
        builder.branch(check)
        builder.position_at_end(check)
        k, a, b = (builder.phi(value.type) for value in state[:3])
        total = [[builder.phi(_VECTOR) for _ in row] for row in state[3]]
        _incoming((k, a, b, total), state, before)
        builder.cbranch(builder.icmp_signed("<", k, until), body, after)
        builder.position_at_end(body)
        next_a, next_b, more = a, b, [list(row) for row in total]
        for _ in range(unrolled):
            across = [_load(builder, builder.gep(next_b, [_number(v * LANES)])) for v in range(vectors)]
            for r in range(ROWS):
                x = _repeated(builder, builder.load(builder.gep(next_a, [_number(r)]), align=4))
                more[r] = [_fma(builder, x, y, z) for y, z in zip(across, more[r], strict=True)]
            next_a, next_b = builder.gep(next_a, [steps[0]]), builder.gep(next_b, [steps[1]])
        state = (builder.add(k, _number(unrolled)), next_a, next_b, more)
        _incoming((k, a, b, total), state, builder.basic_block)
        builder.branch(check)
        builder.position_at_end(after)
        state, before = (k, a, b, total), after
    read, written, end = (function.append_basic_block(name) for name in ("read", "written", "end"))
    builder.cbranch(builder.fcmp_unordered("!=", kept, ir.Constant(_FLOAT, 0.0)), read, written)
    for block in (read, written):
        builder.position_at_end(block)
        factor, row = _repeated(builder, kept), at[2]
        for line in state[3]:
            for v, value in enumerate(line):
                place = builder.gep(row, [_number(v * LANES)])
                old = _fma(builder, _load(builder, place), factor, value) if block is read else value
                _store(builder, old, place)
            row = builder.gep(row, [steps[2]])
        builder.branch(end)
    builder.position_at_end(end)


def _incoming(phis: tuple[Any, ...], values: tuple[Any, ...], block: Any) -> None:
    for phi, value in zip(phis[:3], values[:3], strict=True):
        phi.add_incoming(value, block)
    for row, given in zip(phis[3], values[3], strict=True):
        for phi, value in zip(row, given, strict=True):
            phi.add_incoming(value, block)


# Tiles of one, two and three vectors across: multiply(a, a0, a_step, b, b0, b_step, c, c0, c_step, terms, kept).
# Step k multiplies a[a0 + k a_step + r] by b[b0 + k b_step + i], summed in c[c0 + r c_step + i] added to
# kept times the old value, which is not read if kept is 0.
multiply_1, multiply_2, multiply_3 = (_multiply(vectors) for vectors in (1, 2, 3))


def _transpose(rows: int) -> Any:
    """``rows`` rows of LANES numbers to LANES rows of ``rows``."""

    @intrinsic
    def function(typing: Any, x: Any, x0: Any, x_step: Any, y: Any, y0: Any, y_step: Any) -> Any:
        def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
            source = _at(context, builder, call.args[0], args[0], args[1])
            target = _at(context, builder, call.args[3], args[3], args[4])
            lines = []
            for _ in range(rows):
                lines.append(_load(builder, source))
                source = builder.gep(source, [args[2]])
            lines += [ir.Constant(_VECTOR, ir.Undefined)] * (LANES - rows)
            for line in transposed(builder, lines):
                kept = ir.Constant(ir.VectorType(_INT, rows), list(range(rows)))
                _store(builder, builder.shuffle_vector(line, line, kept), target)
                target = builder.gep(target, [args[5]])
            return context.get_dummy_value()

        sizes = [types.int64] * 2
        return types.void(x, *sizes, y, *sizes), generate

    return function


# transpose(x, x0, x_step, y, y0, y_step): y[y0 + i y_step + r] = x[x0 + r x_step + i] for LANES i, and for LANES or
# ROWS r.
transpose_lanes, transpose_rows = _transpose(LANES), _transpose(ROWS)
