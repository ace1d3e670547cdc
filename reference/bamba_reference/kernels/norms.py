"""RMS norms in Triton, one program per row: plain, after the addition to the residual stream, and gated by groups."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from bamba_reference.kernels.launch import check, overlaps, padded, rows_apart


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.ops.rms_norm``: x (…, d), rounded once to x's dtype."""
    return _norm(x, None, weight, eps)[1]


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, rounded to their dtype, and its ``rms_norm``: (…, d) each, in one pass."""
    return _norm(x, delta, weight, eps)


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check(x)
    flat = rows_apart(x.reshape(-1, x.shape[-1]))
    more = None if delta is None else rows_apart(delta.reshape(flat.shape))
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    total = flat if more is None else torch.empty_like(out)
    width = padded(flat.shape[1])
    _rms_norm[(len(flat),)](
        flat,
        more,
        weight,
        total,
        out,
        flat.shape[1],
        flat.stride(0),
        0 if more is None else more.stride(0),
        eps,
        WIDTH=width,
        OVERLAP=overlaps(x.device),
        num_warps=_warps(width),
    )
    return total.view(x.shape), out.view(x.shape)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """``torch.ops.gated_norm``: rms_norm of y * silu(z) over each of ``groups`` parts: y (…, I) in z's dtype.

    z (B, L, I) may be strided along B and L.
    """
    check(z)
    B, L, inner = z.shape
    y, z = rows_apart(y.reshape(B * L, inner)), rows_apart(z)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    width = padded(inner // groups)
    _gated_norm[(B * L, groups)](
        y,
        z,
        weight,
        out,
        L,
        inner,
        inner // groups,
        y.stride(0),
        *z.stride()[:2],
        eps,
        WIDTH=width,
        OVERLAP=overlaps(z.device),
        num_warps=_warps(width),
    )
    return out


def _warps(width: int) -> int:
    """As many warps as give each thread sixteen elements of the row, if possible."""
    return min(16, max(1, width // 512))


@triton.jit
def _rms_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    d: tl.tensor,
    x_row: tl.tensor,
    delta_row: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        gdc_launch_dependents()
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    v = tl.load(x + row * x_row + c, mask=c < d, other=0).to(tl.float32)
    if delta is not None:
        v += tl.load(delta + row * delta_row + c, mask=c < d, other=0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * d + c, rounded, mask=c < d)
        v = rounded.to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(v * v, axis=0) / d + eps)
    v = v * scale * tl.load(weight + c, mask=c < d, other=0).to(tl.float32)
    tl.store(out + row * d + c, v.to(out.dtype.element_ty), mask=c < d)


@triton.jit
def _gated_norm(
    y: tl.tensor,
    z: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    L: tl.tensor,
    inner: tl.tensor,
    size: tl.tensor,
    y_row: tl.tensor,
    z_row: tl.tensor,
    z_token: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        gdc_launch_dependents()
    token, offset = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    here = offset < size
    c = tl.program_id(1) * size + offset
    gate = tl.load(z + token // L * z_row + token % L * z_token + c, mask=here, other=0).to(tl.float32)
    v = tl.load(y + token * y_row + c, mask=here, other=0).to(tl.float32) * gate / (1 + tl.exp(-gate))
    scale = 1 / tl.sqrt_rn(tl.sum(v * v, axis=0) / size + eps)
    v = v * scale * tl.load(weight + c, mask=here, other=0).to(tl.float32)
    tl.store(out + token * inner + c, v.to(out.dtype.element_ty), mask=here)
