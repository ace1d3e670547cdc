"""What a thread reads of a block's bytes."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def byte(at: tl.tensor) -> tl.tensor:
    return tl.load(at).to(tl.int32)


@triton.jit
def short(at: tl.tensor) -> tl.tensor:
    """Two bytes, the low one first, as an integer that is not negative."""
    return byte(at) | (byte(at + 1) << 8)


@triton.jit
def word(at: tl.tensor) -> tl.tensor:
    """Four bytes, the low one first; a shift to the right copies the topmost bit."""
    return short(at) | (short(at + 2) << 16)


@triton.jit
def half(at: tl.tensor) -> tl.tensor:
    return short(at).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nibble(at: tl.tensor, j: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """Of each group the first half lies in the low four bits, the second in the high."""
    both = byte(at + j // GROUP * (GROUP // 2) + j % (GROUP // 2))
    return (both >> (j % GROUP // (GROUP // 2) * 4)) & 15


@triton.jit
def field(at: tl.tensor, j: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Number j of those of 1, 2 or 4 bits that follow one another, the lowest bits of a byte first."""
    return (byte(at + j // (8 // BITS)) >> (j % (8 // BITS) * BITS)) & ((1 << BITS) - 1)
