"""The states between the chunks of Mamba-2's recurrence, and going back the gradients of these states, in Triton."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.chunks import Decays
from bamba_reference.kernels.launch import padded
from bamba_reference.kernels.scan import add_dot

# Rows of heads and columns of the state that are multiplied at a time.
ROWS, COLUMNS = 64, 64


def states(
    u: Tensor,
    V: Tensor,
    weights: Tensor,
    decay: Decays,
    segment: Tensor | None,
    begin: Tensor,
    Q: int,
    wide: bool,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk (B, H, chunks, P, N) float32, and the last one (B, H, P, N).

    A chunk multiplies the state by its decay and adds Σ_t weights_t u_t ⊗ V_t, u (B, L, H, P), V (B, L, G, N). With
    ``reverse`` the walk is from the last chunk to the first, of the gradients of states.
    """
    rows, L, H, P = u.shape
    G, N = V.shape[2:]
    chunks = -(-L // Q)
    states = torch.empty(rows, H, chunks, P, N, dtype=torch.float32, device=u.device)
    last = torch.empty_like(begin)
    block, columns = padded(P, most=ROWS), padded(N, most=COLUMNS)
    _walk[(H, -(-P // block) * -(-N // columns), rows)](
        u, V, weights, decay.reaches, segment, begin, states, last,
        L, H, P, N, H // G, *u.stride()[:3], *V.stride()[:3],
        Q=Q, ROWS=block, COLUMNS=columns, WIDE=wide, REVERSE=reverse, num_warps=4, num_stages=2,
    )  # fmt: skip
    return states, last


@triton.jit
def _walk(
    u: tl.tensor,
    V: tl.tensor,
    weights: tl.tensor,
    reaches: tl.tensor,
    segment: tl.tensor,
    begin: tl.tensor,
    states: tl.tensor,
    last: tl.tensor,
    L: tl.tensor,
    H: tl.tensor,
    P: tl.tensor,
    N: tl.tensor,
    heads_a_group: tl.tensor,
    u_row: tl.tensor,
    u_token: tl.tensor,
    u_head: tl.tensor,
    V_row: tl.tensor,
    V_token: tl.tensor,
    V_group: tl.tensor,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
) -> None:
    head, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks, chunks = tl.cdiv(N, COLUMNS), tl.cdiv(L, Q)
    p = tl.program_id(1) // blocks * ROWS + tl.arange(0, ROWS)  # (P,)
    n = tl.program_id(1) % blocks * COLUMNS + tl.arange(0, COLUMNS)  # (N,)
    i = tl.arange(0, Q)  # (q,)
    of_state = p[:, None] * N + n[None, :]
    stored = (p < P)[:, None] & (n < N)[None, :]
    h = tl.load(begin + (row * H + head) * P * N + of_state, mask=stored, other=0).to(tl.float32)
    u += row * u_row + head * u_head + p[None, :]
    V += row * V_row + head // heads_a_group * V_group + n[None, :]
    at = (row * H + head) * chunks
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        tl.store(states + (at + chunk) * P * N + of_state, h, mask=stored)
        t = chunk * Q + i
        weight = tl.load(weights + (at + chunk) * Q + i)  # (q,)
        decay = tl.load(reaches + (at + chunk) * Q + Q - 1)
        if segment is not None:
            of_row = segment + row * L
            mine = tl.load(of_row + t, mask=t < L, other=-1)
            first = tl.load(of_row + chunk * Q - 1, mask=chunk > 0, other=0)
            end = tl.load(of_row + tl.minimum(chunk * Q + Q, L) - 1)
            weight = tl.where(mine == (first if REVERSE else end), weight, 0)
            decay = tl.where(first == end, decay, 0)
        us = tl.load(u + t[:, None] * u_token, mask=(t < L)[:, None] & (p < P)[None, :], other=0)  # (q, P)
        Vs = tl.load(V + t[:, None] * V_token, mask=(t < L)[:, None] & (n < N)[None, :], other=0)  # (q, N)
        h = add_dot(tl.trans(us.to(tl.float32) * weight[:, None]), Vs, h * decay, WIDE)
    tl.store(last + (row * H + head) * P * N + of_state, h, mask=stored)
