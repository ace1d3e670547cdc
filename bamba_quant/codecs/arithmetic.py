"""The arithmetic of ggml's C as compiled for x86-64 without FMA, on numpy arrays, bit for bit.

Every sum here runs in serial order: float32 addition does not associate, and the bytes depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, I32, U8

Function = TypeVar("Function", bound=Callable[..., Any])

ONE = np.float32(1)
ZERO = np.float32(0)

_MAGIC = np.float32(12582912)  # 1.5 · 2^23: adding it leaves the nearest integer in the low mantissa bits
_MANTISSA = np.int32(0x007FFFFF)
_MAGIC_MANTISSA = np.int32(0x00400000)


def quiet(function: Function) -> Function:
    """Silence numpy's warnings about infinities and NaN: ggml relies on how they compare."""
    return np.errstate(all="ignore")(function)


def nearest_int(v: F32) -> I32:
    """Round half to even; beyond ±2^22 and for NaN the same wrong values as ggml-quants.c:621."""
    bits: I32 = (v + _MAGIC).view(np.int32)
    bits &= _MANTISSA
    bits -= _MAGIC_MANTISSA
    return bits


def nearest_clipped(v: F32, low: int, high: int) -> F32:
    """``nearest_int`` clipped to [low, high], as float32, which holds these integers exactly."""
    return np.clip(nearest_int(v), np.int32(low), np.int32(high)).astype(np.float32)


def truncate(v: F32) -> I32:
    """C's (int) cast as x86 performs it: toward zero, and -2^31 for NaN and numbers out of range."""
    fits = np.abs(v) < np.float32(2**31)
    return np.where(fits, v, np.float32(-(2**31))).astype(np.int32)


def round_half_away(v: F32) -> F32:
    """C's roundf: halves go away from zero. v - floor(v) is exact in float32."""
    magnitude = np.abs(v)
    floor = np.floor(magnitude)
    rounded: F32 = np.copysign(floor + (magnitude - floor >= np.float32(0.5)), v)
    return rounded


def serial_sum(terms: F32) -> F32:
    """0 + terms[0] + terms[1] + … over the leading axis, in that order."""
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total += term
    return total


def largest(v: F32) -> F32:
    """The signed value of the first strictly greatest magnitude along the leading axis; 0 where all are 0."""
    magnitude = np.zeros(v.shape[1:], np.float32)
    value = np.zeros(v.shape[1:], np.float32)
    for item in v:
        above = np.abs(item) > magnitude
        magnitude = np.where(above, np.abs(item), magnitude)
        value = np.where(above, item, value)
    return value


def extremes(v: F32) -> tuple[F32, F32]:
    """Least and greatest along the leading axis; of 0 and -0 the first one stays."""
    low, high = v[0], v[0]
    for item in v[1:]:
        low = np.where(item < low, item, low)
        high = np.where(item > high, item, high)
    return low, high


def reciprocal(d: F32) -> F32:
    """1/d, and 0 where d is 0."""
    return np.where(d != 0, ONE / d, ZERO)


def ratio(numerator: F32, denominator: F32) -> F32:
    """numerator/denominator where the denominator is positive, else 0."""
    return np.where(denominator > 0, numerator / denominator, ZERO)


def half_bytes(d: NDArray[Any]) -> U8:
    """float32 or float16 (n,) to the two bytes of its float16, (2, n)."""
    return d.astype("<f2").view(np.uint8).reshape(-1, 2).T


def through_half(d: F32) -> F32:
    """d rounded to float16."""
    return d.astype(np.float16).astype(np.float32)


def as_bytes(v: NDArray[Any]) -> U8:
    """Integers to uint8, modulo 256 as C stores them."""
    return (v.astype(np.int32) & 255).astype(np.uint8)
