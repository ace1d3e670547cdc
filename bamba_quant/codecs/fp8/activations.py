"""Activations rounded to e4m3 by token in Triton: torch's codes and scales to the bit, read once from memory."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds; a longer token is read again, from the cache.
_COLUMNS = 4096
_WARPS = 4


def quantize_by_token(x: Tensor, most: int = _COLUMNS) -> tuple[Tensor, Tensor]:
    """e4m3 codes (tokens, columns) and scales (tokens, 1), float32, of x (tokens, columns) of float32 or narrower.

    A scale is the token's largest magnitude over 448, 1 where all is 0 or one is NaN; codes are the nearest to x over
    it, NaN where that is none. ``most`` columns are worked on together.
    """
    x = x.contiguous()
    tokens, columns = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = min(most, triton.next_power_of_2(columns))
    _by_token[(tokens,)](x, codes, scale, columns, BLOCK=block, num_warps=_WARPS)
    return codes, scale


@triton.jit
def _nearest(v: tl.tensor) -> tl.tensor:
    """The e4m3 number nearest to v, half to even, as float32: Triton's interpreter rounds ties differently."""
    size = tl.abs(v)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)  # of 2^-6 at least
    # Added to 2^23 quanta a float32 keeps no digits below one quantum.
    many = ((exponent + 20) << 23).to(tl.float32, bitcast=True)
    rounded = (size + many) - many
    # 0 keeps its sign, too.
    return (rounded.to(tl.int32, bitcast=True) | (v.to(tl.int32, bitcast=True) & -2147483648)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _by_token(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x += token * columns
    codes += token * columns
    largest, missing = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        values = tl.load(x + start + i, mask=start + i < columns, other=0).to(tl.float32)
        # On a GPU the maximum of a number and NaN is the number.
        largest = tl.maximum(largest, tl.abs(values))
        missing = tl.maximum(missing, (values != values).to(tl.int32))
    step = tl.div_rn(tl.max(largest, axis=0), 448.0)
    step = tl.where((step > 0) & (tl.max(missing, axis=0) == 0), step, 1.0)
    tl.store(scale + token, step)
    for start in range(0, columns, BLOCK):
        values = tl.load(x + start + i, mask=start + i < columns, other=0).to(tl.float32)
        quotient = tl.div_rn(values, step + tl.zeros_like(values))
        rounded = _nearest(tl.minimum(tl.maximum(quotient, -448.0), 448.0)).to(tl.float8e4nv)
        # Triton's interpreter converts NaN differently too.
        bits = tl.where(quotient != quotient, 0x7F, rounded.to(tl.int8, bitcast=True))
        tl.store(
            codes + start + i, bits.to(tl.int8).to(tl.float8e4nv, bitcast=True), mask=start + i < columns
        )
