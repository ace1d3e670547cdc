"""Products of float32 whose gradients are products of bfloat16, for processors that have those: they take half as long.

What is computed is exactly what it was. A gradient's relative error is bfloat16's, 2⁻⁹ for each of its terms.
"""
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def supported(device: torch.device) -> bool:
    """Whether the device is a CPU with instructions for bfloat16."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """``torch.ops.linear`` of float32."""
    y: Tensor = _Product.apply(x, weight)
    return y if bias is None else y + bias


def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
    """``torch.ops.head`` of float32."""
    return linear(x, weight, None, name)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x.bfloat16(), weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.bfloat16().flatten(0, -2)  # (T, out)
        to_x, to_weight = ctx.needs_input_grad
        return (
            (rows @ weight.bfloat16()).float().view(x.shape) if to_x else None,
            (rows.t() @ x.flatten(0, -2)).float() if to_weight else None,
        )
