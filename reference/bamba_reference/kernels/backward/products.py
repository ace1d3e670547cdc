"""Matrix products with gradients, all cuBLAS's: the few-row kernels of ``kernels.matmul`` have none."""
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bamba_reference.kernels import matmul
from bamba_reference.kernels.backward.elementwise import swiglu
from bamba_reference.torch.ops import linear


def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
    """``torch.ops.head``: logits (…, V), float32, of x (…, d) by weight (V, d).

    The logits' gradient is rounded to x's dtype before it is multiplied.
    """
    y: Tensor = _Head.apply(x, weight)
    return y


def add_linear(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, name: str, multiplier: float = 1.0
) -> Tensor:
    """``matmul.add_linear``: x + linear(y) * multiplier, a sum of its own."""
    return torch.add(x, linear(y, weight, bias, name), alpha=multiplier)


def gate_up(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None, str],
    up: tuple[Tensor, Tensor | None, str],
    multiplier: float = 1.0,
) -> Tensor:
    """``matmul.gate_up``: silu(linear(x, gate) * multiplier) * linear(x, up)."""
    return swiglu(linear(x, *gate), linear(x, *up), multiplier)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul.head(x, weight, "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        gradient = gradient.to(x.dtype)
        return (
            gradient @ weight if to_x else None,
            gradient.flatten(0, -2).t() @ x.flatten(0, -2) if to_weight else None,
        )
