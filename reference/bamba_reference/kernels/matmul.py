"""Matrix products: cuBLAS for many rows, and for a few rows a Triton kernel that reads each weight once.

A product of a few rows takes as long as reading its matrix from memory; the operations around it (bias, SwiGLU, the
addition to the residual stream) are fused into the kernel. The kernel sums in float32; cuBLAS as torch's settings say.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bamba_reference.kernels.elementwise import swiglu
from bamba_reference.kernels.launch import overlaps, padded
from bamba_reference.torch import ops as torch_ops

# Rows of activations up to which a matrix is read by the kernel below.
FEW = 4


@dataclass(frozen=True)
class MatmulTuning:
    """Rows of the matrix a program multiplies, terms of their sums it loads at once, and its warps."""

    rows: int = 1
    terms: int = 2048
    warps: int = 4


DEFAULT = MatmulTuning()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, *, settled: bool = False) -> Tensor:
    """``torch.ops.linear``: x (…, in) times weight (out, in) transposed, plus bias (out,): (…, out).

    ``settled``, here and below: no running kernel writes the weight, so that it may be read early.
    """
    if _few(x, weight):
        return few_rows(x, weight, bias=bias, settled=settled)
    return F.linear(x, weight, bias)


def add_linear(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: str,
    multiplier: float = 1.0,
    *,
    settled: bool = False,
) -> Tensor:
    """x + linear(y) * multiplier, rounded once: x (…, out), which may be overwritten, y (…, in)."""
    if _few(y, weight):
        return few_rows(y, weight, multiplier=multiplier, bias=bias, residual=x, settled=settled)
    total, flat = x.view(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if bias is None:
        return torch.addmm(total, flat, weight.t(), alpha=multiplier, out=total).view(x.shape)
    return total.copy_(_wide_product(flat, weight).add_(bias).mul_(multiplier).add_(total)).view(x.shape)


def gate_up(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None, str],
    up: tuple[Tensor, Tensor | None, str],
    multiplier: float = 1.0,
    *,
    settled: bool = False,
) -> Tensor:
    """silu(linear(x, gate) * multiplier) * linear(x, up), each a tuple of weight (ffn, d), bias, name: (…, ffn)."""
    if gate[1] is None and up[1] is None and _few(x, gate[0]) and gate[0].stride() == up[0].stride():
        return few_rows(x, gate[0], gated=up[0], multiplier=multiplier, settled=settled)
    both = _joined(gate[0], up[0]) if gate[1] is None and up[1] is None else None
    if both is None:
        return swiglu(linear(x, *gate, settled=settled), linear(x, *up, settled=settled), multiplier)
    left, right = F.linear(x, both).split(len(gate[0]), dim=-1)
    return swiglu(left, right, multiplier)


def arrange(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every gate and up matrix side by side in memory, so that one product multiplies by both.

    Measured on an H200, 8,192 rows by Bamba-9B's: 2.51 ms for one product, 2.80 ms for two.
    """
    arranged = dict(weights)
    for name, gate in weights.items():
        up = weights.get(name.replace("gate_proj", "up_proj"))
        if name.endswith("gate_proj.weight") and up is not None and _joined(gate, up) is None:
            both = torch.cat([gate, up])
            arranged[name], arranged[name.replace("gate_proj", "up_proj")] = both.split(len(gate))
    return arranged


def _joined(first: Tensor, second: Tensor) -> Tensor | None:
    """Two matrices as one, without a copy, where the second begins in memory where the first ends."""
    beside = second.data_ptr() == first.data_ptr() + first.nbytes and first.is_contiguous()
    same = second.is_contiguous() and second.dtype == first.dtype and second.shape[1:] == first.shape[1:]
    if not (beside and same and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()):
        return None
    return first.as_strided((len(first) + len(second), first.shape[1]), first.stride())


def head(x: Tensor, weight: Tensor, name: str, *, settled: bool = False) -> Tensor:
    """``torch.ops.head``: logits (…, V), float32: exact products of the model's dtype, summed in float32."""
    if _few(x, weight):
        return few_rows(x, weight, dtype=torch.float32, settled=settled)
    return _wide_product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) times weight (out, in) transposed: (rows, out), float32."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return torch_ops.head(x, weight, "")
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _few(x: Tensor, weight: Tensor) -> bool:
    small = x.numel() <= FEW * x.shape[-1] and x.dtype != torch.float32
    return bool(small and x.is_cuda and weight.stride(1) == 1)


def few_rows(
    x: Tensor,
    weight: Tensor,
    *,
    gated: Tensor | None = None,
    multiplier: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    settled: bool = False,
    tuning: MatmulTuning = DEFAULT,
) -> Tensor:
    """x (…, in) times weight (out, in) transposed, plus bias (out,), times ``multiplier``, plus residual (…, out).

    The result (…, out) is of ``dtype``. With ``gated``, a second matrix of weight's shape and strides: silu of the
    first product, scaled so, times the second.
    """
    rows, terms = weight.shape
    flat = x.reshape(-1, terms)
    out = torch.empty(*x.shape[:-1], rows, dtype=dtype or x.dtype, device=x.device)
    overlap = settled and overlaps(x.device)
    # Programs that multiply the same rows of the matrix are neighbours, so that the first one caches it for all.
    _few_rows[(len(flat) * -(-rows // tuning.rows),)](
        flat,
        weight,
        gated,
        multiplier,
        bias,
        None if residual is None else residual.reshape(-1, rows),
        out,
        len(flat),
        rows,
        terms,
        flat.stride(0),
        weight.stride(0),
        ROWS=tuning.rows,
        TERMS=min(tuning.terms, padded(terms)),
        OVERLAP=overlap,
        num_warps=tuning.warps,
        **({"launch_pdl": True} if overlap else {}),
    )
    return out


@triton.jit
def _few_rows(
    x: tl.tensor,
    weight: tl.tensor,
    gated: tl.tensor,
    multiplier: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    terms: tl.tensor,
    x_row: tl.tensor,
    weight_row: tl.tensor,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    m, r = tl.program_id(0) % count, tl.program_id(0) // count * ROWS + tl.arange(0, ROWS)  # (r,)
    k = tl.arange(0, TERMS)  # (k,)
    line = r.to(tl.int64)[:, None] * weight_row + k[None, :]  # (r, k)
    here = (r < rows)[:, None] & (k < terms)[None, :]
    total = tl.zeros((ROWS, TERMS), tl.float32)
    second = tl.zeros((ROWS, TERMS), tl.float32)
    # With OVERLAP the weights are fetched before the kernel that computes x has ended.
    w = tl.load(weight + line, mask=here, other=0)
    v = w
    if gated is not None:
        v = tl.load(gated + line, mask=here, other=0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, terms, TERMS):
        xs = tl.load(x + m * x_row + start + k, mask=start + k < terms, other=0).to(tl.float32)[
            None, :
        ]  # (1, k)
        total += xs * w.to(tl.float32)
        here = (r < rows)[:, None] & (start + TERMS + k < terms)[None, :]
        w = tl.load(weight + line + (start + TERMS), mask=here, other=0)
        if gated is not None:
            second += xs * v.to(tl.float32)
            v = tl.load(gated + line + (start + TERMS), mask=here, other=0)
    y = tl.sum(total, axis=1)  # (r,)
    if bias is not None:
        y += tl.load(bias + r, mask=r < rows, other=0).to(tl.float32)
    y *= multiplier
    if gated is not None:
        y = y / (1 + tl.exp(-y)) * tl.sum(second, axis=1)
    if residual is not None:
        y += tl.load(residual + m * rows + r, mask=r < rows, other=0).to(tl.float32)
    tl.store(out + m * rows + r, y.to(out.dtype.element_ty), mask=r < rows)
