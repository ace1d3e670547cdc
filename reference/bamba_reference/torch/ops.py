"""Each operation of the forward pass in plain torch: any device, any float dtype, differentiable.

dt, A, decays, states, norms, softmax and rotary angles are "wide": float32 whatever the model's dtype, and float64 for
a float64 model. Shapes are named as in ``model``, with a batch B in front.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Rows of the vocabulary that are converted at once for the logits.
HEAD_ROWS = 16384


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values that must not be rounded to the model's: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """x (…, in) times weight (out, in) transposed, plus bias (out,): (…, out) in x's dtype."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, rounded once at the end to x's dtype."""
    v = x.to(wide(x.dtype))
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)  # (…, 1)
    return (v * scale * weight.to(v.dtype)).to(x.dtype)


def unit_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, wide: a norm without weights."""
    v = x.to(wide(x.dtype))
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def column_sums(x: Tensor) -> Tensor:
    """Σ x² and Σ x over all dimensions of x (…, n) but the last: (2, n) float64."""
    values = x.detach().flatten(0, -2).to(wide(x.dtype))
    return torch.stack([values.square().sum(0).double(), values.sum(0).double()])


def conv(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
) -> Tensor:
    """Causal depthwise convolution and SiLU: xBC (B, L, W) behind tail (B, K-1, W) -> (B, L, W), wide.

    weight (W, K), its last column for the current token; bias (W,). ``sequence_starts`` (B, L) marks tokens that begin
    a packed sequence: nothing from before them is seen.
    """
    L, K, dtype = xBC.shape[1], weight.shape[1], wide(xBC.dtype)
    xBC, tail = xBC.to(dtype), tail.to(dtype)
    taps = weight.to(dtype).t().contiguous()  # (K, W)
    out = xBC * taps[K - 1]  # (B, L, W)
    if bias is not None:
        out += bias.to(dtype)
    age = None if sequence_starts is None else ages(sequence_starts)
    for back in range(1, K):
        tap, first = taps[K - 1 - back], min(back, L)  # (W,), tokens that look back into the tail
        earlier = xBC[:, : L - first]  # (B, L - first, W)
        if age is not None:
            earlier = earlier * (age[:, first:] >= back)[..., None]
        out[:, first:].addcmul_(earlier, tap)
        before = tail[:, K - 1 - back : K - 1 - back + first]  # (B, first, W)
        if sequence_starts is not None:
            before = before * (sequence_starts[:, :first].cumsum(1) == 0)[..., None]
        out[:, :first].addcmul_(before, tap)
    return F.silu(out)


def next_tail(tail: Tensor, xBC: Tensor) -> Tensor:
    """The last K-1 of the convolution's inputs so far: tail (B, K-1, W) and then xBC (B, L, W)."""
    before = tail.shape[1]
    inputs = torch.cat([tail, xBC[:, max(0, xBC.shape[1] - before) :]], dim=1).detach()
    return inputs[:, inputs.shape[1] - before :]


def ages(sequence_starts: Tensor) -> Tensor:
    """How many tokens of its own packed sequence precede each token: (B, L)."""
    index = torch.arange(sequence_starts.shape[1], device=sequence_starts.device).expand_as(sequence_starts)
    return index - torch.where(sequence_starts, index, 0).cummax(dim=1).values


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """rms_norm of y * silu(z) over each of ``groups`` parts of the last dimension: y (…, I), in z's dtype."""
    v = (y * F.silu(z.to(y.dtype))).unflatten(-1, (groups, -1))  # (…, G, I/G)
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)  # (…, G, 1)
    return ((v * scale).flatten(-2) * weight.to(v.dtype)).to(z.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + r/2) of each head's first r elements: x (B, L, n, E), cos and sin (B, L, r/2)."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, L, 1, r/2)
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[..., 2 * half :]], dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    padding: Tensor | None,
    sequences: list[tuple[int, int, int]] | None,
) -> Tensor:
    """Causal softmax attention of q (B, L, heads, E) over k and v (B, S, kv, E): (B, L, heads, E).

    Query i of the L is at position S - L + i. ``padding`` (B,): keys before this position are padding and not seen.
    ``sequences``: packed sequences as (row, start, stop), each of which sees only itself. None for both
    means that all rows are whole.
    """
    if sequences is not None:
        parts = [
            attention(q[r : r + 1, i:j], k[r : r + 1, i:j], v[r : r + 1, i:j], scale, None, None)[0]
            for r, i, j in sequences
        ]
        return torch.cat(parts).view_as(q)
    L, S = q.shape[1], k.shape[1]
    mask = None
    if padding is not None or 1 < L < S:
        position = torch.arange(S, device=q.device)
        mask = (position <= position[S - L :, None])[None]  # (1, L, S)
        if padding is not None:
            # Padding sees itself, because a query that sees nothing has no softmax.
            seen = (position >= padding[:, None])[:, None] | (
                position == position[S - L :, None]
            )  # (B, L, S)
            mask = mask & seen
        mask = mask[:, None]  # (B or 1, 1, L, S)
    # Repeated, because with enable_gqa torch computes all scores at once on a CPU (measured: 4 times slower).
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))  # (B, S, heads, E)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and L > 1,
        scale=scale,
    )  # (B, heads, L, E)
    return y.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor, multiplier: float = 1.0) -> Tensor:
    """silu(gate * multiplier) * up, elementwise in their dtype."""
    return F.silu(scaled(gate, multiplier)) * up


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """x * multiplier; x itself where that is 1."""
    return x if multiplier == 1 else x * multiplier


def relu2(x: Tensor) -> Tensor:
    """relu(x)², elementwise in its dtype."""
    return x.relu().square()


def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
    """Logits (…, V), wide, of x (…, d) by weight (V, d): a block of the vocabulary at a time.

    Rounding logits to bfloat16 alone would cost a divergence of 3e-4 to 5e-4.
    """
    x = x.to(wide(x.dtype))
    blocks = [linear(x, rows.to(x.dtype), None, name) for rows in weight.split(HEAD_ROWS)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
