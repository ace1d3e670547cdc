"""exp and silu of single numbers, made of operations that LLVM does on all lanes of a vector at once.

exp64 is exp of float64 numbers.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from bamba_reference.kernels.cpu.launch import inlined

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first of so few digits that n times it is exact (Cody and Waite 1980).
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440054690583e-4)
# A float of this size has no fraction, and its last bits are the number that was added: 1.5 · 2^23.
_TO_WHOLE, _TO_WHOLE_BITS = np.float32(12582912), 0x4B400000
_LEAST, _MOST = np.float32(-87), np.float32(88)
# (exp(r) - 1 - r) / r² for |r| <= ln(2) / 2, to 4e-9 of exp(r): a least-squares fit at Chebyshev's points.
_C0, _C1, _C2, _C3, _C4 = (
    np.float32(c)
    for c in (0.49999988079071045, 0.166665181517601, 0.04166954383254051, 0.00836898759007454, 0.0013751150108873844)
)  # fmt: skip
_ONE, _ZERO, _INFINITY = np.float32(1), np.float32(0), np.float32(np.inf)


@intrinsic
def _power_of_two(typing: Any, t: Any) -> Any:
    """2^n of t = n + _TO_WHOLE."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        n = builder.sub(builder.bitcast(args[0], whole), ir.Constant(whole, _TO_WHOLE_BITS - 127))
        return builder.bitcast(builder.shl(n, ir.Constant(whole, 23)), ir.FloatType())

    return types.float32(types.float32), generate


@inlined
def exp(x: Any) -> Any:
    """exp to about one unit in the last place; 0 below -87, infinity above 88, NaN of NaN."""
    bounded = _LEAST if x < _LEAST else x
    bounded = _MOST if bounded > _MOST else bounded
    t = bounded * _LOG2_E + _TO_WHOLE
    n = t - _TO_WHOLE
    r = bounded - n * _LN_2_HIGH - n * _LN_2_LOW
    rest = _C0 + r * (_C1 + r * (_C2 + r * (_C3 + r * _C4)))
    y = (_ONE + (r + r * r * rest)) * _power_of_two(t)
    y = _INFINITY if x > _MOST else y
    return _ZERO if x < _LEAST else y


@inlined
def silu(x: Any) -> Any:
    """x / (1 + exp(-x))."""
    return x / (_ONE + exp(-x))


# The same of float64: 1.5 · 2^52, and exp(r) to 1e-17 by its series.
_TO_WHOLE_64, _TO_WHOLE_BITS_64 = 6755399441055744.0, 0x4338000000000000
_LN_2_HIGH_64, _LN_2_LOW_64 = 0.693145751953125, 1.42860682030941723212e-6
_LOG2_E_64, _LEAST_64, _MOST_64 = math.log2(math.e), -708.0, 709.0
_T13, _T12, _T11, _T10, _T9, _T8, _T7, _T6, _T5, _T4, _T3 = (1 / math.factorial(k) for k in range(13, 2, -1))


@intrinsic
def _power_of_two_64(typing: Any, t: Any) -> Any:
    """2^n of t = n + _TO_WHOLE_64."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        whole = ir.IntType(64)
        n = builder.sub(builder.bitcast(args[0], whole), ir.Constant(whole, _TO_WHOLE_BITS_64 - 1023))
        return builder.bitcast(builder.shl(n, ir.Constant(whole, 52)), ir.DoubleType())

    return types.float64(types.float64), generate


@inlined
def exp64(x: Any) -> Any:
    """exp to about one unit in the last place; 0 below -708, infinity above 709, NaN of NaN."""
    bounded = _LEAST_64 if x < _LEAST_64 else x
    bounded = _MOST_64 if bounded > _MOST_64 else bounded
    t = bounded * _LOG2_E_64 + _TO_WHOLE_64
    n = t - _TO_WHOLE_64
    r = bounded - n * _LN_2_HIGH_64 - n * _LN_2_LOW_64
    y = (((((_T13 * r + _T12) * r + _T11) * r + _T10) * r + _T9) * r + _T8) * r + _T7
    y = ((((y * r + _T6) * r + _T5) * r + _T4) * r + _T3) * r + 0.5
    y = (1.0 + (r + r * r * y)) * _power_of_two_64(t)
    y = np.inf if x > _MOST_64 else y
    return 0.0 if x < _LEAST_64 else y
