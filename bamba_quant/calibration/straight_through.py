"""Rounding that passes gradients as if it were not there."""
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """x rounded half to even; the gradient passes as it is."""
    y: Tensor = _Round.apply(x)
    return y


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to a narrower float and back; the gradient passes as it is."""
    y: Tensor = _Narrow.apply(x, dtype)
    return y


def looked_up(offset: Tensor, start: Tensor, table: Tensor) -> Tensor:
    """The rising table's value at place start + round(offset); the gradient is that of the line between neighbours."""
    y: Tensor = _LookUp.apply(offset, start, table)
    return y


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, start: Tensor, table: Tensor) -> Tensor:
        low = (start + offset).floor().clamp_(0, len(table) - 2).long()
        ctx.save_for_backward(table[low + 1] - table[low])
        return table[(start + offset.round()).clamp_(0, len(table) - 1).long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None
