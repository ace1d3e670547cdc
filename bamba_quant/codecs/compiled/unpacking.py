"""LLVM code that dequantizes a block, generated of the table of its layout: sixteen weights at a time, no branches.

Weights are ``dequantize``'s to the last bit: products and sums are rounded one by one. Integers stay bytes as long as
they fit, because a vector holds more of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from bamba_quant.codecs.blocks import BlockCodec, PackedRows
from bamba_quant.codecs.compiled.lanes import BYTE, FLOAT, INT, LANES, vector_of
from bamba_quant.codecs.compiled.narrow_floats import e2m1, e4m3, to_bfloat16
from bamba_quant.codecs.layout import Bits, BlockLayout, Field
from bamba_reference.kernels.cpu.launch import has

# emit(builder, block, scale, zero, use): addresses of a block, and of its group's float32 scale and zero where these
# lie elsewhere in the row; use(weights, j) adds what is done with weights j to j + 15, a vector of float32.
Use = Callable[[Any, int], None]
Emit = Callable[[Any, Any, Any, Any, Use], None]


@dataclass(frozen=True)
class Unpacking:
    """``weights`` in ``n_bytes`` become float32 by the code that ``emit`` adds; ``key`` tells it from others."""

    key: str
    weights: int
    n_bytes: int
    emit: Emit


def unpacking(codec: BlockCodec) -> Unpacking | None:
    """The code for a codec's rows, or None where numpy reads them."""
    packed, layout = codec.packed, codec.layout
    if packed is not None:
        if packed.dtype == "f16":
            return None
        n_bytes = LANES * packed.bits // 8
        key = repr((packed.kind, packed.bits, packed.offset, packed.dtype, has("ssse3")))
        return Unpacking(key, LANES, n_bytes, _packed(packed))
    if layout is not None and all(bits.run == 1 or bits.run % LANES == 0 for bits in layout.codes.bits):
        key = f"{codec.name} {has('ssse3')}"
        return Unpacking(key, layout.block, layout.block_bytes, _of_layout(layout))
    if codec.name in ("f16", "bf16"):
        return Unpacking(codec.name, LANES, 2 * LANES, _halves if codec.name == "f16" else _bfloat16)
    return None


def _of_layout(layout: BlockLayout) -> Emit:
    def emit(builder: Any, block: Any, scale: Any, zero: Any, use: Use) -> None:
        code = _Block(builder, block)
        d = code.power(layout.d) if layout.exponent else code.half(layout.d)
        dmin = None if layout.dmin is None else code.half(layout.dmin)
        if layout.added and dmin is not None:
            dmin = builder.fneg(dmin)
        steps = _scaled(code, d, layout.scales)
        lows = None if dmin is None else _scaled(code, dmin, layout.minima)
        for j in range(0, layout.block, LANES):
            g = j // layout.group
            q = code.integers(layout.codes, j)
            signed = bool(layout.codes.zero or layout.codes.signed or layout.table is not None)
            if layout.table is not None:
                q = code.looked_up(layout.table, q)
            weights = builder.fmul(steps(g), code.floats(q, signed))
            use(weights if lows is None else builder.fsub(weights, lows(g)), j)

    return emit


def _scaled(code: _Block, d: Any, field: Field | None) -> Callable[[int], Any]:
    """d times integer g of a field, in every lane."""
    if field is None:
        every = code.repeated(d)
        return lambda g: every
    products = code.lanes(field)
    if products is None:
        return lambda g: code.repeated(code.builder.fmul(d, code.integer(field, g)))
    products = code.builder.fmul(code.repeated(d), products)
    return lambda g: code.lane(products, g)


def _packed(packed: PackedRows) -> Emit:
    def emit(builder: Any, block: Any, scale: Any, zero: Any, use: Use) -> None:
        code = _Block(builder, block)
        step = code.repeated(code.float32(scale))
        if packed.kind == "e4m3":
            value = e4m3(code, code.bytes(0, LANES))
        elif packed.kind == "e2m1":
            value = e2m1(code, code.integers(Field((Bits(0, 4, LANES),)), 0))
        else:
            bits = (Bits(0, packed.bits, LANES),)
            # Shifting the offset's bits to the top and back extends the sign.
            top = code.constant(BYTE, 8 - packed.bits)
            q = builder.sub(code.integers(Field(bits), 0), code.constant(BYTE, packed.offset))
            value = code.floats(builder.ashr(builder.shl(q, top), top), signed=True)
        if packed.kind.endswith("integer"):
            value = builder.fsub(value, code.repeated(code.float32(zero)))
        value = builder.fmul(step, value)
        if packed.kind.endswith("float"):
            value = builder.fadd(value, code.repeated(code.float32(zero)))
        use(to_bfloat16(code, value) if packed.dtype == "bf16" else value, 0)

    return emit


def _halves(builder: Any, block: Any, scale: Any, zero: Any, use: Use) -> None:
    code = _Block(builder, block)
    use(code.from_half(code.words()), 0)


def _bfloat16(builder: Any, block: Any, scale: Any, zero: Any, use: Use) -> None:
    code = _Block(builder, block)
    widened = builder.shl(code.words(), code.constant(INT, 16))
    use(builder.bitcast(widened, vector_of(FLOAT)), 0)


class _Block:
    """Instructions that read the block at an address; bytes are loaded once."""

    def __init__(self, builder: Any, address: Any) -> None:
        self.builder = builder
        self._address = address
        self._loaded: dict[tuple[int, int], Any] = {}

    def bytes(self, at: int, count: int) -> Any:
        """``count`` bytes from ``at`` on, as a vector of them."""
        if (at, count) not in self._loaded:
            place = self.builder.gep(self._address, [_index(at)])
            pointer = self.builder.bitcast(place, ir.VectorType(BYTE, count).as_pointer())
            self._loaded[at, count] = self.builder.load(pointer, align=1)
        return self._loaded[at, count]

    def byte(self, at: int) -> Any:
        return self.builder.zext(self.builder.load(self.builder.gep(self._address, [_index(at)])), INT)

    def words(self) -> Any:
        """The sixteen words of the block, as integers."""
        kind = ir.VectorType(ir.IntType(16), LANES)
        words = self.builder.load(self.builder.bitcast(self._address, kind.as_pointer()), align=1)
        return self.builder.zext(words, vector_of(INT))

    def float32(self, address: Any) -> Any:
        return self.builder.load(self.builder.bitcast(address, FLOAT.as_pointer()), align=1)

    def half(self, at: int) -> Any:
        """The float16 at ``at``, as a float32."""
        high = self.builder.shl(self.byte(at + 1), ir.Constant(INT, 8))
        return self.from_half(self.builder.or_(self.byte(at), high))

    def from_half(self, half: Any) -> Any:
        """The values of a float16's bits, an integer or a vector of them (``arithmetic.from_half``)."""
        builder, number = self.builder, FLOAT if half.type == INT else vector_of(FLOAT)

        def constant(value: int) -> Any:
            return ir.Constant(INT, value) if half.type == INT else self.constant(INT, value)

        widened = builder.shl(builder.and_(half, constant(0x7FFF)), constant(13))
        factor = ir.Constant(FLOAT, 2.0**112) if half.type == INT else self.constant(FLOAT, 2.0**112)
        scaled = builder.bitcast(builder.fmul(builder.bitcast(widened, number), factor), half.type)
        special = builder.icmp_unsigned("==", builder.and_(half, constant(0x7C00)), constant(0x7C00))
        scaled = builder.select(special, builder.or_(widened, constant(0x7F800000)), scaled)
        sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
        return builder.bitcast(builder.or_(scaled, sign), number)

    def power(self, at: int) -> Any:
        """``layout.half_powers`` of the byte at ``at``."""
        builder, e = self.builder, self.byte(at)
        one, two = ir.Constant(INT, 1), ir.Constant(INT, 2)
        low = builder.mul(builder.add(e, one), ir.Constant(INT, 0x00200000))
        high = builder.shl(builder.sub(e, one), ir.Constant(INT, 23))
        return builder.bitcast(builder.select(builder.icmp_unsigned("<", e, two), low, high), FLOAT)

    def integer(self, field: Field, j: int) -> Any:
        """Integer j of a field, as a float."""
        builder, value = self.builder, ir.Constant(INT, 0)
        for bits in field.bits:
            k = j - bits.first
            if 0 <= k < bits.count:
                shift = bits.shift + k // bits.run % bits.per_byte * bits.width
                part = builder.lshr(self.byte(_byte_of(bits, k)), ir.Constant(INT, shift))
                part = builder.and_(part, ir.Constant(INT, (1 << bits.width) - 1))
                value = builder.or_(value, builder.shl(part, ir.Constant(INT, bits.low)))
        sign = 1 << 7 if field.signed else 0
        value = builder.sub(builder.xor(value, ir.Constant(INT, sign)), ir.Constant(INT, sign or field.zero))
        return builder.sitofp(value, FLOAT)

    def lanes(self, field: Field) -> Any:
        """The integers of a field of at most sixteen, as floats; None where a byte holds several."""
        if any(bits.per_byte > 1 for bits in field.bits):
            return None
        builder, value = self.builder, self.constant(BYTE, 0)
        for bits in field.bits:
            few = self.bytes(bits.at, bits.count)
            numbers = (0, bits.shift, (1 << bits.width) - 1, bits.low)
            nothing, shift, mask, low = (ir.Constant(few.type, [n] * bits.count) for n in numbers)
            few = builder.shl(builder.and_(builder.lshr(few, shift), mask), low)
            # Lanes without an integer take the first one of nothing.
            places = [min(k % 256, bits.count) for k in range(-bits.first, LANES - bits.first)]
            part = builder.shuffle_vector(few, nothing, ir.Constant(vector_of(INT), places))
            value = builder.or_(value, part)
        value = builder.sub(value, self.constant(BYTE, field.zero)) if field.zero else value
        return self.floats(value, signed=bool(field.zero or field.signed))

    def lane(self, vector: Any, g: int) -> Any:
        """Lane g in every lane."""
        return self.builder.shuffle_vector(vector, vector, ir.Constant(vector_of(INT), [g] * LANES))

    def integers(self, field: Field, j: int) -> Any:
        """Integers j to j + 15 of a field, as bytes; j is a multiple of sixteen."""
        builder, value = self.builder, None
        for bits in field.bits:
            part, k = self._stored(bits, j - bits.first), j - bits.first
            if bits.width < 8:
                if bits.run > 1 or bits.per_byte == 1:
                    shift = bits.shift + k // bits.run % bits.per_byte * bits.width
                    part = builder.lshr(part, self.constant(BYTE, shift))
                part = builder.and_(part, self.constant(BYTE, (1 << bits.width) - 1))
            part = builder.shl(part, self.constant(BYTE, bits.low)) if bits.low else part
            value = part if value is None else builder.or_(value, part)
        # A signed byte is its own bits.
        return builder.sub(value, self.constant(BYTE, field.zero)) if field.zero else value

    def _stored(self, bits: Bits, k: int) -> Any:
        """The bytes that hold integers k to k + 15 of ``bits``, in lanes; of neighbours, shifted to the lowest bits."""
        builder, each = self.builder, bits.per_byte
        if bits.run > 1 or each == 1:
            return self.bytes(bits.at + k if each == 1 else _byte_of(bits, k), LANES)
        few = self.bytes(bits.at + k // each, LANES // each)
        shifts = [bits.shift + i * bits.width for i in range(each)]
        parts = [builder.lshr(few, ir.Constant(few.type, [shift] * few.type.count)) for shift in shifts]
        while len(parts) > 1:  # interleaved: those of the first half of a byte with those of the second
            half = len(parts) // 2
            parts = [self._interleaved(parts[i], parts[i + half]) for i in range(half)]
        return parts[0]

    def _interleaved(self, a: Any, b: Any) -> Any:
        count = a.type.count
        order = [i // 2 + i % 2 * count for i in range(2 * count)]
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, 2 * count), order))

    def looked_up(self, table: Any, q: Any) -> Any:
        """The values of a table of at most sixteen whole numbers for indices q, as bytes."""
        whole = [int(value) for value in table]
        assert np.array_equal(whole, table) and len(whole) <= q.type.count
        whole += [0] * (q.type.count - len(whole))
        if has("ssse3"):
            kind = ir.FunctionType(q.type, [q.type] * 2)
            function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
            return self.builder.call(function, [ir.Constant(q.type, whole), q])
        value = self.constant(BYTE, whole[0])
        for i, number in enumerate(whole[1:], start=1):
            same = self.builder.icmp_unsigned("==", q, self.constant(BYTE, i))
            value = self.builder.select(same, self.constant(BYTE, number), value)
        return value

    def floats(self, q: Any, signed: bool) -> Any:
        extend = self.builder.sext if signed else self.builder.zext
        return self.builder.sitofp(extend(q, vector_of(INT)), vector_of(FLOAT))

    def repeated(self, value: Any) -> Any:
        undefined = ir.Constant(vector_of(FLOAT), ir.Undefined)
        return self.lane(self.builder.insert_element(undefined, value, ir.Constant(INT, 0)), 0)

    def constant(self, kind: ir.Type, value: float) -> Any:
        return ir.Constant(vector_of(kind), [value] * LANES)


def _index(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _byte_of(bits: Bits, k: int) -> int:
    return bits.at + k // (bits.run * bits.per_byte) * bits.run + k % bits.run
