"""Rotary embedding, SwiGLU and ReLU² in Triton, each one pass, computed in float32 and rounded once."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import check, padded, rows_apart

_COLUMNS = 2048


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``torch.ops.rotary``: x (B, L, n, E), strided but for the last dimension; cos and sin (B or 1, L, r/2)."""
    check(x)
    x = rows_apart(x)
    B, L, heads, E = x.shape
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    _rotary[(L, B)](
        x,
        cos,
        sin,
        out,
        L,
        heads,
        E,
        half,
        *x.stride()[:3],
        0 if len(cos) == 1 else L * half,
        HEADS=padded(heads, least=1),
        HALF=padded(half),
        REST=padded(E - 2 * half) if 2 * half < E else 0,
    )
    return out


def swiglu(gate: Tensor, up: Tensor, multiplier: float = 1.0) -> Tensor:
    """``torch.ops.swiglu``: silu(gate * multiplier) * up, (…, F), rounded once to their dtype."""
    check(gate)
    shape, F = gate.shape, gate.shape[-1]
    gate, up = rows_apart(gate.reshape(-1, F)), rows_apart(up.reshape(-1, F))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _swiglu[(len(gate), -(-F // _COLUMNS))](
        gate, up, out, multiplier, F, gate.stride(0), up.stride(0), COLUMNS=_COLUMNS, num_warps=8
    )
    return out.view(shape)


def relu2(x: Tensor) -> Tensor:
    """``torch.ops.relu2``: relu(x)², (…, F), rounded once to its dtype."""
    check(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    _relu2[(-(-x.numel() // _COLUMNS),)](x, out, x.numel(), COLUMNS=_COLUMNS, num_warps=8)
    return out


@triton.jit
def _relu2(x: tl.tensor, out: tl.tensor, count: tl.tensor, COLUMNS: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.maximum(tl.load(x + i, mask=i < count, other=0).to(tl.float32), 0)
    tl.store(out + i, (v * v).to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _rotary(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    L: tl.tensor,
    heads: tl.tensor,
    E: tl.tensor,
    half: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    angle_row: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row, t = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]  # (n, 1), (1, r/2)
    here = (head < heads) & (i < half)
    angle = row * angle_row + t * half + i
    c = tl.load(cos + angle, mask=i < half, other=0).to(tl.float32)
    s = tl.load(sin + angle, mask=i < half, other=0).to(tl.float32)
    source = x + row * x_row + t * x_token + head * x_head
    target = out + ((row * L + t) * heads + head) * E
    first = tl.load(source + i, mask=here, other=0).to(tl.float32)
    second = tl.load(source + half + i, mask=here, other=0).to(tl.float32)
    tl.store(target + i, (first * c - second * s).to(out.dtype.element_ty), mask=here)
    tl.store(target + half + i, (second * c + first * s).to(out.dtype.element_ty), mask=here)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)[None, :]
        passed = (head < heads) & (j < E)
        tl.store(target + j, tl.load(source + j, mask=passed, other=0), mask=passed)


@triton.jit
def _swiglu(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    multiplier: tl.tensor,
    F: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = tl.load(gate + row * gate_row + c, mask=c < F, other=0).to(tl.float32) * multiplier
    u = tl.load(up + row * up_row + c, mask=c < F, other=0).to(tl.float32)
    tl.store(out + row * F + c, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=c < F)
