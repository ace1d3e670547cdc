"""Attention: torch's kernels for many tokens; for one new token a row a kernel that reads the length on the device.

For one token the positions are divided among programs that each keep a softmax of their own, and a second kernel
joins them (flash decoding, Dao et al. 2023). Sums are float32.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import INTERPRETED, padded
from bamba_reference.torch import ops as torch_ops

# Programs among which a head's positions are divided, and positions that each reads at once.
_PARTS = 2 if INTERPRETED else 16
_POSITIONS = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    padding: Tensor | None,
    sequences: list[tuple[int, int, int]] | None,
) -> Tensor:
    """``torch.ops.attention``, without repeating keys and values where torch's kernels support grouped queries.

    q (B, L, heads, E), k and v (B, S, kv, E) of one dtype, ``padding`` and ``sequences`` as there: (B, L, heads, E).
    """
    L, S = q.shape[1], k.shape[1]
    # Only torch's 16-bit kernel takes fewer key than query heads; in float32 it would store all L × S scores a head.
    narrow = q.dtype != torch.float32 or q.shape[2] == k.shape[2]
    if not (q.is_cuda and narrow) or padding is not None or sequences is not None or 1 < L < S:
        return torch_ops.attention(q, k, v, scale, padding, sequences)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=L > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )  # (B, heads, L, E)
    return y.transpose(1, 2)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, last: Tensor, padding: Tensor) -> Tensor:
    """q (B, 1, heads, E) over positions padding[b] … last of k and v (B, S, kv, E), contiguous: (B, 1, heads, E).

    ``last`` (1,), the position of the new token, and ``padding`` (B,), the padding, are int64 on the device.
    """
    B, _, heads, E = q.shape
    S, kv = k.shape[1:3]
    q = q.contiguous()
    out = torch.empty_like(q)
    sums = torch.empty(B, heads, _PARTS, E, dtype=torch.float32, device=q.device)
    highest = torch.empty(B, heads, _PARTS, dtype=torch.float32, device=q.device)
    weight = torch.empty_like(highest)
    width = padded(E)
    _decode_attention[(heads, _PARTS, B)](
        q,
        k,
        v,
        last,
        padding,
        sums,
        highest,
        weight,
        scale,
        S,
        heads,
        kv,
        heads // kv,
        E,
        PARTS=_PARTS,
        POSITIONS=_POSITIONS,
        WIDTH=width,
    )
    _join[(heads, B)](sums, highest, weight, out, heads, E, PARTS=_PARTS, WIDTH=width)
    return out


@triton.jit
def _decode_attention(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    last: tl.tensor,
    padding: tl.tensor,
    sums: tl.tensor,
    highest: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    S: tl.tensor,
    heads: tl.tensor,
    kv: tl.tensor,
    shared: tl.tensor,
    E: tl.tensor,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row, head, part = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, WIDTH)
    first, stop = tl.load(padding + row), tl.load(last) + 1
    first = tl.minimum(first, stop - 1)
    size = tl.cdiv(stop - first, PARTS)
    begin = first + part * size
    end = tl.minimum(begin + size, stop)
    query = tl.load(q + (row * heads + head) * E + e, mask=e < E, other=0).to(tl.float32) * scale
    source = (row * S * kv + head // shared) * E
    total = tl.zeros((WIDTH,), tl.float32)
    top = tl.full((), -float("inf"), tl.float32)
    norm = tl.full((), 0.0, tl.float32)
    for start in range(begin, end, POSITIONS):
        position = start + tl.arange(0, POSITIONS)  # (s,)
        here = (position < end)[:, None] & (e < E)[None, :]
        at = source + position[:, None] * kv * E + e[None, :]
        keys = tl.load(k + at, mask=here, other=0).to(tl.float32)  # (s, E)
        score = tl.where(position < end, tl.sum(keys * query[None, :], axis=1), -float("inf"))  # (s,)
        higher = tl.maximum(top, tl.max(score, axis=0))
        p = tl.exp(score - higher)  # (s,)
        values = tl.load(v + at, mask=here, other=0).to(tl.float32)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(values * p[:, None], axis=0)
        norm = norm * shrink + tl.sum(p, axis=0)
        top = higher
    index = (row * heads + head) * PARTS + part
    tl.store(sums + index * E + e, total, mask=e < E)
    tl.store(highest + index, top)
    tl.store(weight + index, norm)


@triton.jit
def _join(
    sums: tl.tensor,
    highest: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    E: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    index = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    part, e = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    top = tl.load(highest + index * PARTS + part)  # (parts,)
    scale = tl.exp(top - tl.max(top, axis=0))
    norm = tl.sum(tl.load(weight + index * PARTS + part) * scale, axis=0)
    parts = tl.load(sums + (index * PARTS + part[:, None]) * E + e[None, :], mask=(e < E)[None, :], other=0)
    y = tl.sum(parts * scale[:, None], axis=0) / norm
    tl.store(out + index * E + e, y.to(out.dtype.element_ty), mask=e < E)
