"""Functions that several kernels call: exponentials exact to the last digit, softplus, and loads of blocks."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from bamba_reference.kernels.launch import INTERPRETED

# libdevice's functions, which the interpreter lacks, have an error of one unit in the last place; Triton's own exp
# multiplies by log2 e first and loses as many digits as the product has before the point.
_LIBDEVICE: tl.constexpr = tl.constexpr(not INTERPRETED)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(v: tl.tensor) -> tl.tensor:
    """e^v, to the last digits also where v is large."""
    if _LIBDEVICE:
        return libdevice.exp(v)
    else:
        return tl.exp(v)


@triton.jit
def softplus(v: tl.tensor) -> tl.tensor:
    """log(1 + e^v) without overflow, to the last digits also where e^v is small."""
    if _LIBDEVICE:
        log1p = libdevice.log1p(exp(-tl.abs(v)))
    else:  # Kahan's log1p
        small = tl.exp(-tl.abs(v))
        above = 1 + small
        log1p = tl.where(above == 1, small, tl.log(above) * (small / tl.where(above == 1, 1, above - 1)))
    return tl.maximum(v, 0) + log1p


@triton.jit
def load(at: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """The values at these addresses, 0 outside of the mask. WHOLE says that the mask is all true."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0)
