"""The decays within the chunks of Mamba-2's recurrence, and the masked C·Bᵀ.

The scan reads both for every head and chunk, in several arrangements, so they are computed once beforehand: decays
for each head, pairs for each group of heads.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.arithmetic import LOG2_E, exp, softplus

# Heads whose decays a program computes.
_HEADS = 16


@dataclass(frozen=True)
class Decays:
    """For every head and token (B, H, tokens), float32; padding after the last token has dt 0.

    ``steps`` is dt; ``sums`` is log2 of the decay from the chunk's beginning to each token, ``reaches`` that decay
    itself; ``keeps`` is dt times the decay from the token to the chunk's end.
    """

    steps: Tensor
    sums: Tensor
    reaches: Tensor
    keeps: Tensor


def decays(
    dt: Tensor, A_log: Tensor, dt_bias: Tensor, limit: tuple[float, float], real: Tensor | None, Q: int
) -> Decays:
    """From raw dt (B, L, H), any strides, in chunks of Q tokens; ``real`` (B, L) is false at padding, of dt 0."""
    rows, L, H = dt.shape
    chunks = -(-L // Q)
    found = Decays(*torch.empty(4, rows, H, chunks * Q, dtype=torch.float32, device=dt.device))
    _decays[(chunks, -(-H // _HEADS), rows)](
        dt,
        A_log,
        dt_bias,
        real,
        found.steps,
        found.sums,
        found.reaches,
        found.keeps,
        L,
        H,
        *limit,
        *dt.stride(),
        Q=Q,
        HEADS=_HEADS,
    )
    return found


def pairs(B: Tensor, C: Tensor, segment: Tensor | None, Q: int, state: int, wide: bool) -> Tensor:
    """B_j · C_i for tokens j ≤ i of one chunk and one segment, 0 for others: float32 (B, chunks, G, j, i).

    B and C (B, L, G, N), their last elements side by side; ``segment`` (B, L) int32. ``state`` is N padded to a block
    of Triton's, and ``wide`` multiplies in float32.
    """
    rows, L, G, N = B.shape
    chunks = -(-L // Q)
    found = torch.empty(rows, chunks, G, Q, Q, dtype=torch.float32, device=B.device)
    _pairs[(chunks, G, rows)](
        B, C, segment, found, L, N, G, *B.stride()[:3], *C.stride()[:3], Q=Q, STATE=state, WIDE=wide
    )
    return found


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """a @ b of the model's dtype, exact products summed in float32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _decays(
    dt: tl.tensor,
    A_log: tl.tensor,
    dt_bias: tl.tensor,
    real: tl.tensor,
    steps: tl.tensor,
    sums: tl.tensor,
    reaches: tl.tensor,
    keeps: tl.tensor,
    L: tl.tensor,
    H: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dt_row: tl.tensor,
    dt_token: tl.tensor,
    dt_head: tl.tensor,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    row, i = tl.program_id(2).to(tl.int64), tl.arange(0, Q)  # (q,)
    t = tl.program_id(0) * Q + i
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # (H,)
    mine = (head < H)[None, :]
    dt += row * dt_row + head[None, :] * dt_head
    if real is not None:
        real += row * L
    bias = tl.load(dt_bias + head, mask=head < H, other=0).to(tl.float32)[None, :]
    A = -LOG2_E * exp(tl.load(A_log + head, mask=head < H, other=0).to(tl.float32))[None, :]
    step = _steps(dt, bias, real, t, t < L, mine, low, high, dt_token)  # (q, H)
    a = tl.cumsum(step * A, axis=0)
    # Summed from the chunk's end, so that tokens near it, which decay least, are the most exact.
    after = _steps(dt, bias, real, t + 1, (t + 1 < L) & (i + 1 < Q), mine, low, high, dt_token)
    left = tl.cumsum(after * A, axis=0, reverse=True)
    place = (row * H + head[None, :]) * (tl.num_programs(0) * Q) + t[:, None]
    tl.store(steps + place, step, mask=mine)
    tl.store(sums + place, a, mask=mine)
    tl.store(reaches + place, tl.exp2(a), mask=mine)
    tl.store(keeps + place, tl.exp2(left) * step, mask=mine)


@triton.jit
def _steps(
    dt: tl.tensor,
    bias: tl.tensor,
    real: tl.tensor,
    t: tl.tensor,
    there: tl.tensor,
    mine: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dt_token: tl.tensor,
) -> tl.tensor:
    """dt (q, H) of tokens t (q,), 0 where ``there`` is false or the token is padding."""
    here = there[:, None] & mine
    raw = tl.load(dt + t.to(tl.int64)[:, None] * dt_token, mask=here, other=0).to(tl.float32)
    step = tl.where(here, tl.minimum(tl.maximum(softplus(raw + bias), low), high), 0)
    if real is not None:
        counts = tl.load(real + t, mask=there, other=0).to(tl.int32)
        step = tl.where((counts != 0)[:, None], step, 0)
    return step


@triton.jit
def _pairs(
    B: tl.tensor,
    C: tl.tensor,
    segment: tl.tensor,
    pairs: tl.tensor,
    L: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    B_row: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_row: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    Q: tl.constexpr,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    chunk, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, Q), tl.arange(0, STATE)  # (q,), (N,)
    t = chunk.to(tl.int64) * Q + i
    here = (t < L)[:, None] & (n < N)[None, :]
    Bs = tl.load(
        B + row * B_row + group * B_group + t[:, None] * B_token + n[None, :], mask=here, other=0
    )  # (q, N)
    Cs = tl.load(
        C + row * C_row + group * C_group + t[:, None] * C_token + n[None, :], mask=here, other=0
    )  # (q, N)
    visible = i[:, None] <= i[None, :]  # token j, the row, from token i, the column
    if segment is not None:
        mine = tl.load(segment + row * L + t, mask=t < L, other=0)
        visible = visible & (mine[:, None] == mine[None, :])
    CB = tl.where(visible, dot(Bs, tl.trans(Cs), WIDE), 0)  # (j, i)
    base = ((row * tl.num_programs(0) + chunk) * G + group) * Q * Q
    tl.store(pairs + base + i[:, None] * Q + i[None, :], CB)
