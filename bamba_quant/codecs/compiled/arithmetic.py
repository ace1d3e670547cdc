"""The float32 and integer arithmetic of ``bamba_quant.codecs.arithmetic`` on lanes, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    at_least,
    at_most,
    bits_of,
    floats,
    from_bits,
    ints,
    load,
    magnitude,
    store_bytes,
    to_floats,
    to_ints,
    where,
)

MAGIC = np.float32(12582912)  # 1.5 · 2^23, as in nearest_int


@inlined
def nearest_int(v: Any) -> Any:
    """Half to even; wraps beyond ±2^22 as ggml-quants.c:621 does."""
    return (bits_of(v + MAGIC) & 0x007FFFFF) - 0x00400000


@inlined
def nearest_clipped(v: Any, low: int, high: int) -> Any:
    """``nearest_int`` clipped to [low, high], as floats."""
    return to_floats(at_least(at_most(nearest_int(v), high), low))


@inlined
def truncate(v: Any) -> Any:
    """C's (int) cast as x86 performs it: -2^31 for NaN and numbers out of range."""
    return to_ints(where(magnitude(v) < 2147483648.0, v, -2147483648.0))


@inlined
def round_half_away(v: Any) -> Any:
    """C's roundf as integers, by truncation, whose remainder is exact in float32."""
    whole = truncate(v)
    rest = v - to_floats(whole)
    # Numbers out of range leave a rest beyond 1 or NaN, and keep the truncated value.
    up, down = (rest >= 0.5) & (rest < 1), (rest <= -0.5) & (rest > -1)
    return whole + where(up, 1, where(down, ints(-1), 0))


@inlined
def reciprocal(d: Any) -> Any:
    """1/d, and 0 where d is 0."""
    return where(d != 0, 1 / d, 0)


@inlined
def ratio(numerator: Any, denominator: Any) -> Any:
    """numerator/denominator where the denominator is positive, else 0."""
    return where(denominator > 0, numerator / denominator, 0)


@inlined
def largest(x: Any, first: int, n: int) -> Any:
    """The signed value of the first strictly greatest magnitude in n rows; 0 where all are 0."""
    value = floats(0)
    for i in range(first, first + n):
        item = load(x, i)
        value = where(magnitude(item) > magnitude(value), item, value)
    return value


@inlined
def to_half(d: Any) -> Any:
    """The sixteen bits of d as float16, half to even, by ggml's own steps (ggml-impl.h:419)."""
    bits = bits_of(d)
    exponent = at_least((bits >> 23) & 0xFF, 0x71)
    scaled = magnitude(d) * np.float32(2.0**112) * np.float32(2.0**-110)
    rounded = bits_of(from_bits((exponent << 23) + 0x07800000) + scaled)
    number = ((rounded >> 13) & 0x7C00) + (rounded & 0x0FFF)
    return ((bits >> 16) & 0x8000) | where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7E00, number)


@inlined
def from_half(half: Any) -> Any:
    """The float32 value of the sixteen bits of a float16."""
    widened = (half & 0x7FFF) << 13
    number = bits_of(from_bits(widened) * np.float32(2.0**112))
    special = (half & 0x7C00) == 0x7C00
    return from_bits(((half & 0x8000) << 16) | where(special, widened | 0x7F800000, number))


@inlined
def store_half(tile: Any, row: int, half: Any) -> None:
    """Two bytes of each lane, the low one first."""
    store_bytes(tile, row, half)
    store_bytes(tile, row + 1, half >> 8)
