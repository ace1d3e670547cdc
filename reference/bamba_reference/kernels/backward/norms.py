"""RMS norms with gradients: ``kernels.norms`` forward, and one kernel backward for the plain and the gated ones.

With v the normed values (x, or y silu(z)), s = 1 / rms(v) and u the output's gradient times the weight, the gradient of
v is s u - v s³ mean(u v). Only inputs are kept. The weight's gradient is summed by each program over its rows, and then
over programs, always in the same order.
"""
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels import norms
from bamba_reference.kernels.launch import padded, rows_apart

# Programs among which rows are divided: four for each of an H200's processors.
_PROGRAMS = 528


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.ops.rms_norm``: x (…, d), rounded once to x's dtype."""
    y: Tensor = _Norm.apply(x, None, weight, eps)[1]
    return y


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, rounded to their dtype, and its ``rms_norm``: (…, d) each."""
    total, y = _Norm.apply(x, delta, weight, eps)
    return total, y


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """``torch.ops.gated_norm``: y (B, L, I), z (B, L, I) strided along B and L; in z's dtype."""
    out: Tensor = _GatedNorm.apply(y, z, weight, groups, eps)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        if delta is None:
            ctx.save_for_backward(x, weight)
            return None, norms.rms_norm(x, weight, eps)
        total, y = norms.add_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, weight)
        return total, y

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if of_y is None:
            return of_total, of_total, None, None
        to_x, _, to_weight = _gradients(
            total, None, weight, of_y, of_total, 1, ctx.eps, ctx.needs_input_grad[2]
        )
        return to_x, to_x if ctx.needs_input_grad[1] else None, to_weight, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return norms.gated_norm(y, z, weight, groups, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        found = _gradients(y, z, weight, gradient, None, ctx.groups, ctx.eps, ctx.needs_input_grad[2])
        return *found, None, None


def _gradients(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    more: Tensor | None,
    groups: int,
    eps: float,
    weighted: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, with ``more`` added, and of z and, if it is ``weighted``, of the weight."""
    inner = x.shape[-1]
    size, width = inner // groups, padded(inner // groups)
    rows, of_y = rows_apart(x.reshape(-1, inner)), rows_apart(gradient.reshape(-1, inner))
    more = None if more is None else rows_apart(more.reshape(-1, inner))
    to_x, to_z = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if z is not None:
        z, to_z = rows_apart(z), torch.empty(z.shape, dtype=z.dtype, device=z.device)
    programs, sums = min(len(rows), _PROGRAMS), None
    if weighted:
        sums = torch.empty(programs, inner, dtype=torch.float32, device=x.device)
    _norm_gradients[(programs, groups)](
        rows,
        z,
        weight,
        of_y,
        more,
        to_x,
        to_z,
        sums,
        len(rows),
        1 if z is None else z.shape[1],
        inner,
        size,
        rows.stride(0),
        *((0, 0) if z is None else z.stride()[:2]),
        of_y.stride(0),
        0 if more is None else more.stride(0),
        eps,
        WIDTH=width,
        num_warps=min(16, max(1, width // 256)),
    )
    return to_x, to_z, None if sums is None else sums.sum(0).to(weight.dtype)


@triton.jit
def _norm_gradients(
    x: tl.tensor,
    z: tl.tensor,
    weight: tl.tensor,
    gradient: tl.tensor,
    more: tl.tensor,
    to_x: tl.tensor,
    to_z: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    L: tl.tensor,
    inner: tl.tensor,
    size: tl.tensor,
    x_row: tl.tensor,
    z_row: tl.tensor,
    z_token: tl.tensor,
    gradient_row: tl.tensor,
    more_row: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    first, programs, offset = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, WIDTH)
    here = offset < size
    c = tl.program_id(1) * size + offset
    w = tl.load(weight + c, mask=here, other=0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in range(tl.cdiv(rows - tl.program_id(0), programs)):
        row = first + k * programs
        v = tl.load(x + row * x_row + c, mask=here, other=0).to(tl.float32)
        if z is not None:
            gate = tl.load(z + row // L * z_row + row % L * z_token + c, mask=here, other=0).to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-gate))
            y = v
            v = y * gate * sigmoid
        g = tl.load(gradient + row * gradient_row + c, mask=here, other=0).to(tl.float32)
        scale = 1 / tl.sqrt_rn(tl.sum(v * v, axis=0) / size + eps)
        if sums is not None:
            total += g * (v * scale)
        u = g * w
        d = scale * (u - v * (scale * scale * tl.sum(u * v, axis=0) / size))
        if more is not None:
            d += tl.load(more + row * more_row + c, mask=here, other=0).to(tl.float32)
        if z is not None:
            of_gate = d * y * sigmoid * (1 + gate * (1 - sigmoid))
            tl.store(to_z + row * inner + c, of_gate.to(to_z.dtype.element_ty), mask=here)
            d = d * gate * sigmoid
        tl.store(to_x + row * inner + c, d.to(to_x.dtype.element_ty), mask=here)
    if sums is not None:
        tl.store(sums + first * inner + c, total, mask=here)
