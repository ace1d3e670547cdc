"""A weight of TQ1_0, read on a GPU: its codes are digits of base 3, which no table of bits describes."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from bamba_quant.codecs.gpu.bits import byte, half


@triton.jit
def tq1_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    second, third = j - 160, j - 240
    position = tl.where(j < 160, j % 32, tl.where(j < 240, 32 + second % 16, 48 + third % 4))
    n = tl.where(j < 160, j // 32, tl.where(j < 240, second // 16, third // 4))
    power = tl.where(n == 0, 1, tl.where(n == 1, 3, tl.where(n == 2, 9, tl.where(n == 3, 27, 81))))
    trit = (((byte(at + position) * power) & 255) * 3) >> 8
    return (trit - 1).to(tl.float32) * half(at + 52)


WEIGHTS = {"tq1_0": tq1_0}


def table(name: str) -> None:
    """It looks nothing up."""
