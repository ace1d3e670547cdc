"""exp and silu of single numbers, made of operations that LLVM does on all lanes of a vector at once."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

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
