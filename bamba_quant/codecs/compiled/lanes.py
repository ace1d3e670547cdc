"""Vectors of sixteen lanes as numba types: kernels read like scalar C, and each lane computes what C would.

A lane is one block, so each lane keeps C's order of operations while LLVM spends one instruction on all of
them: sixteen lanes are one AVX-512 register, two of AVX2, four of SSE2 or NEON. No operation carries a
fast-math flag, and none is fused except by ``fused``: without the flag ``contract`` LLVM keeps a product
and a sum apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

LANES = 16

FLOAT = ir.FloatType()
INT, WORD, BYTE, BIT = (ir.IntType(width) for width in (32, 16, 8, 1))
Emit = Callable[..., Any]


def primitive(typed: Callable[..., Any]) -> Any:
    """A function of kernels that ``typed`` turns into LLVM instructions (numba's ``intrinsic``)."""
    return intrinsic(typed)


class Vector(types.Type):  # type: ignore[misc]
    """The numba type of sixteen elements of one LLVM type."""

    def __init__(self, name: str, element: ir.Type) -> None:
        self.element = element
        super().__init__(name=f"{name}x{LANES}")


FLOATS, INTS, MASK = Vector("floats", FLOAT), Vector("ints", INT), Vector("mask", BIT)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is an LLVM vector, in registers and in memory."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector_of(vector.element))


def vector_of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def as_vector(context: Any, builder: Any, value: Any, given: types.Type, wanted: Vector) -> Any:
    """A vector as it is; a scalar rounded to the element's type and repeated in every lane."""
    if isinstance(given, Vector):
        return value
    scalar = context.cast(builder, value, given, types.float32 if wanted is FLOATS else types.int32)
    undefined = ir.Constant(vector_of(wanted.element), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector_of(INT), [0] * LANES))


def common(*operands: types.Type) -> Any:
    """The one ``Vector`` among operands of which the others are plain numbers; else None."""
    vectors = {operand for operand in operands if isinstance(operand, Vector)}
    numbers = [operand for operand in operands if not isinstance(operand, Vector)]
    if len(vectors) != 1 or not all(
        isinstance(types.unliteral(n), (types.Float, types.Integer)) for n in numbers
    ):
        return None
    (vector,) = vectors
    return None if vector is INTS and any(isinstance(n, types.Float) for n in numbers) else vector


def _define_binary(symbol: Any, emit: dict[Vector, Emit], result: Vector | None = None) -> None:
    """Give a Python operator its meaning on the vectors that ``emit`` names, mixed with numbers or not."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
            vector = common(*args) if len(args) == 2 else None
            if vector not in emit:
                return None
            return signature(result or vector, *(types.unliteral(arg) for arg in args))

    def lower(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        vector = common(*call.args)
        pair = (
            as_vector(context, builder, arg, given, vector)
            for arg, given in zip(args, call.args, strict=True)
        )
        return emit[vector](builder, *pair)

    infer_global(symbol)(Template)
    for vector in emit:
        for pair in ((vector, vector), (vector, types.Number), (types.Number, vector)):
            lower_builtin(symbol, *pair)(lower)


def _compare(symbol: str) -> dict[Vector, Emit]:
    """C's comparisons: with NaN, != is true and all others are false."""

    def floats(builder: Any, a: Any, b: Any) -> Any:
        compare = builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered
        return compare(symbol, a, b)

    return {FLOATS: floats, INTS: lambda builder, a, b: builder.icmp_signed(symbol, a, b)}


_define_binary(operator.add, {FLOATS: ir.IRBuilder.fadd, INTS: ir.IRBuilder.add})
_define_binary(operator.sub, {FLOATS: ir.IRBuilder.fsub, INTS: ir.IRBuilder.sub})
_define_binary(operator.mul, {FLOATS: ir.IRBuilder.fmul, INTS: ir.IRBuilder.mul})
_define_binary(operator.truediv, {FLOATS: ir.IRBuilder.fdiv})
_define_binary(operator.and_, {INTS: ir.IRBuilder.and_, MASK: ir.IRBuilder.and_})
_define_binary(operator.or_, {INTS: ir.IRBuilder.or_, MASK: ir.IRBuilder.or_})
_define_binary(operator.lshift, {INTS: ir.IRBuilder.shl})
_define_binary(operator.rshift, {INTS: ir.IRBuilder.ashr})
for _symbol, _operator in zip(
    ("<", ">", "<=", ">=", "==", "!="),
    (operator.lt, operator.gt, operator.le, operator.ge, operator.eq, operator.ne),
    strict=True,
):
    _define_binary(_operator, _compare(_symbol), result=MASK)


def _unary(argument: Vector, result: Vector, emit: Emit) -> Any:
    @primitive
    def function(typing_context: Any, vector: types.Type) -> Any:
        def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
            return emit(builder, args[0])

        return (result(argument), generate) if vector is argument else None

    return function


def llvm_call(builder: Any, name: str, *args: Any) -> Any:
    """A call of LLVM's intrinsic ``name`` of vectors; the result has the type of the first argument."""
    suffix = f"v{args[0].type.count}{'f32' if args[0].type.element == FLOAT else 'i32'}"
    function_type = ir.FunctionType(args[0].type, [arg.type for arg in args])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}"), args
    )


magnitude = _unary(FLOATS, FLOATS, lambda builder, v: llvm_call(builder, "fabs", v))
square_root = _unary(FLOATS, FLOATS, lambda builder, v: llvm_call(builder, "sqrt", v))
bits_of = _unary(FLOATS, INTS, lambda builder, v: builder.bitcast(v, vector_of(INT)))
from_bits = _unary(INTS, FLOATS, lambda builder, v: builder.bitcast(v, vector_of(FLOAT)))
to_floats = _unary(INTS, FLOATS, lambda builder, v: builder.sitofp(v, vector_of(FLOAT)))
to_ints = _unary(FLOATS, INTS, lambda builder, v: builder.fptosi(v, vector_of(INT)))
negative = _unary(FLOATS, FLOATS, lambda builder, v: builder.fneg(v))
complement = _unary(MASK, MASK, lambda builder, v: builder.not_(v))


def _of_scalar(vector: Vector) -> Any:
    @primitive
    def function(typing_context: Any, scalar: types.Type) -> Any:
        def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
            return as_vector(context, builder, args[0], call.args[0], vector)

        return vector(types.unliteral(scalar)), generate

    return function


floats = _of_scalar(FLOATS)
ints = _of_scalar(INTS)


@primitive
def where(typing_context: Any, mask: types.Type, a: types.Type, b: types.Type) -> Any:
    """Lane by lane ``mask ? a : b``; one of a and b may be a number."""
    vector = common(a, b)

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        pair = (as_vector(context, builder, args[i], call.args[i], vector) for i in (1, 2))
        return builder.select(args[0], *pair)

    if mask is not MASK or vector is None:
        return None
    return vector(mask, types.unliteral(a), types.unliteral(b)), generate


@primitive
def fused(typing_context: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
    """a·b + c rounded once; c may be a number."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        return llvm_call(
            builder, "fma", *args[:2], as_vector(context, builder, args[2], call.args[2], FLOATS)
        )

    return (FLOATS(a, b, types.unliteral(c)), generate) if a is FLOATS and b is FLOATS else None


def _integer_choice(name: str) -> Any:
    @primitive
    def function(typing_context: Any, a: types.Type, b: types.Type) -> Any:
        def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
            return llvm_call(builder, name, args[0], as_vector(context, builder, args[1], call.args[1], INTS))

        return (INTS(a, types.unliteral(b)), generate) if a is INTS else None

    return function


at_most = _integer_choice("smin")
at_least = _integer_choice("smax")


@primitive
def any_lane(typing_context: Any, mask: types.Type) -> Any:
    """Whether the mask holds in any lane."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        return builder.icmp_unsigned(
            "!=", builder.bitcast(args[0], ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
        )

    return types.boolean(mask), generate


def vector_pointer(
    context: Any, builder: Any, array: Any, array_type: Any, index: Any, vector: ir.VectorType
) -> Any:
    """The address of element ``index`` in a contiguous array's memory, as a pointer to a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _row(builder: Any, context: Any, index: Any, index_type: types.Type) -> Any:
    return builder.mul(
        context.cast(builder, index, index_type, types.intp), ir.Constant(ir.IntType(64), LANES)
    )


@primitive
def load(typing_context: Any, rows: types.Type, i: types.Type) -> Any:
    """Row i of float32 scratch of shape (n, 16)."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        index = _row(builder, context, args[1], call.args[1])
        pointer = vector_pointer(context, builder, args[0], call.args[0], index, vector_of(FLOAT))
        return builder.load(pointer, align=4)

    return FLOATS(rows, types.unliteral(i)), generate


@primitive
def load_bytes(typing_context: Any, rows: types.Type, i: types.Type) -> Any:
    """Row i of uint8 scratch of shape (n, 16), as integers."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        index = _row(builder, context, args[1], call.args[1])
        pointer = vector_pointer(context, builder, args[0], call.args[0], index, vector_of(BYTE))
        return builder.zext(builder.load(pointer, align=1), vector_of(INT))

    return INTS(rows, types.unliteral(i)), generate


@primitive
def store(typing_context: Any, rows: types.Type, i: types.Type, v: types.Type) -> Any:
    """Put a vector of floats into row i of float32 scratch of shape (n, 16)."""

    def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
        index = _row(builder, context, args[1], call.args[1])
        pointer = vector_pointer(context, builder, args[0], call.args[0], index, vector_of(FLOAT))
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return (types.void(rows, types.unliteral(i), v), generate) if v is FLOATS else None


def _store_low(element: ir.Type, align: int) -> Any:
    """Put the low bits of a vector of integers into row i of scratch of ``element``, shape (n, 16)."""

    @primitive
    def function(typing_context: Any, rows: types.Type, i: types.Type, v: types.Type) -> Any:
        def generate(context: Any, builder: Any, call: Any, args: tuple[Any, ...]) -> Any:
            index = _row(builder, context, args[1], call.args[1])
            pointer = vector_pointer(context, builder, args[0], call.args[0], index, vector_of(element))
            builder.store(builder.trunc(args[2], vector_of(element)), pointer, align=align)
            return context.get_dummy_value()

        return (types.void(rows, types.unliteral(i), v), generate) if v is INTS else None

    return function


store_bytes = _store_low(BYTE, align=1)
store_words = _store_low(WORD, align=2)
