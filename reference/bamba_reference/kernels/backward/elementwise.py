"""Rotary embedding, SwiGLU and ReLU² with gradients: ``kernels.elementwise`` forward, one pass backward.

Only inputs are kept; gradients are computed in float32 and rounded once.
"""
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels import elementwise
from bamba_reference.kernels.launch import rows_apart

_COLUMNS = 1024


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``torch.ops.rotary``: x (B, L, n, E); cos and sin (B or 1, L, r/2), which get no gradient."""
    y: Tensor = _Rotary.apply(x, cos, sin)
    return y


def swiglu(gate: Tensor, up: Tensor, multiplier: float = 1.0) -> Tensor:
    """``torch.ops.swiglu``: silu(gate * multiplier) * up, (…, F), rounded once to their dtype."""
    y: Tensor = _SwiGLU.apply(gate, up, multiplier)
    return y


def relu2(x: Tensor) -> Tensor:
    """``torch.ops.relu2``: relu(x)², (…, F), rounded once to its dtype."""
    y: Tensor = _ReLU2.apply(x)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return elementwise.rotary(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return elementwise.rotary(gradient, cos, -sin), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, multiplier: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.multiplier = multiplier
        return elementwise.swiglu(gate, up, multiplier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        F = gate.shape[-1]
        g, u, d = (rows_apart(v.reshape(-1, F)) for v in (gate, up, gradient))
        to_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        to_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        _swiglu_gradients[(len(g), -(-F // _COLUMNS))](
            g, u, d, to_gate, to_up, ctx.multiplier, F, *(v.stride(0) for v in (g, u, d)), COLUMNS=_COLUMNS
        )
        return to_gate, to_up, None


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return elementwise.relu2(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x, gradient = x.contiguous(), gradient.contiguous()
        to_x = torch.empty_like(x)
        _relu2_gradient[(-(-x.numel() // _COLUMNS),)](x, gradient, to_x, x.numel(), COLUMNS=_COLUMNS)
        return to_x


@triton.jit
def _swiglu_gradients(
    gate: tl.tensor,
    up: tl.tensor,
    gradient: tl.tensor,
    to_gate: tl.tensor,
    to_up: tl.tensor,
    multiplier: tl.tensor,
    F: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    gradient_row: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = tl.load(gate + row * gate_row + c, mask=c < F, other=0).to(tl.float32) * multiplier
    u = tl.load(up + row * up_row + c, mask=c < F, other=0).to(tl.float32)
    d = tl.load(gradient + row * gradient_row + c, mask=c < F, other=0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    of_gate = d * u * sigmoid * (1 + g * (1 - sigmoid)) * multiplier
    tl.store(to_gate + row * F + c, of_gate.to(to_gate.dtype.element_ty), mask=c < F)
    tl.store(to_up + row * F + c, (d * g * sigmoid).to(to_up.dtype.element_ty), mask=c < F)


@triton.jit
def _relu2_gradient(
    x: tl.tensor, gradient: tl.tensor, to_x: tl.tensor, count: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.maximum(tl.load(x + i, mask=i < count, other=0).to(tl.float32), 0)
    d = tl.load(gradient + i, mask=i < count, other=0).to(tl.float32)
    tl.store(to_x + i, (2 * v * d).to(to_x.dtype.element_ty), mask=i < count)
