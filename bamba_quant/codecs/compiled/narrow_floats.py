"""LLVM code that widens and rounds floats of few bits, sixteen at a time; ``code`` is a block of ``unpacking``."""

from __future__ import annotations

from typing import Any

from bamba_quant.codecs.compiled.lanes import FLOAT, INT, vector_of
from bamba_quant.codecs.mxfp4 import VALUES


def e2m1(code: Any, q: Any) -> Any:
    """Codes of e2m1, as bytes."""
    doubled = code.floats(code.looked_up(VALUES, q), signed=True)
    return code.builder.fmul(doubled, code.constant(FLOAT, 0.5))


def e4m3(code: Any, q: Any) -> Any:
    """Bits moved to their places in a float32, whose exponent is then corrected: subnormals come out right."""
    builder = code.builder
    wide = builder.zext(q, vector_of(INT))
    magnitude = builder.and_(wide, code.constant(INT, 0x7F))
    moved = builder.bitcast(builder.shl(magnitude, code.constant(INT, 20)), vector_of(FLOAT))
    number = builder.bitcast(builder.fmul(moved, code.constant(FLOAT, 2.0**120)), vector_of(INT))
    special = builder.icmp_unsigned("==", magnitude, code.constant(INT, 0x7F))
    number = builder.select(special, code.constant(INT, 0x7FC00000), number)
    sign = builder.shl(builder.and_(wide, code.constant(INT, 0x80)), code.constant(INT, 24))
    return builder.bitcast(builder.or_(number, sign), vector_of(FLOAT))


def to_bfloat16(code: Any, value: Any) -> Any:
    """``floats.to_bfloat16``, as float32."""
    builder, sixteen = code.builder, code.constant(INT, 16)
    bits = builder.bitcast(value, vector_of(INT))
    last = builder.and_(builder.lshr(bits, sixteen), code.constant(INT, 1))
    bits = builder.add(builder.add(last, code.constant(INT, 0x7FFF)), bits)
    return builder.bitcast(builder.shl(builder.lshr(bits, sixteen), sixteen), vector_of(FLOAT))
