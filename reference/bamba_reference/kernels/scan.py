"""The Mamba-2 state-space recurrence in Triton: ``torch_ops.scan`` with the state kept on the chip.

The tokens are cut into chunks (Dao and Gu 2024, section 6). ``_decays`` computes dt and its sums times A within
each chunk, ``_pairs`` the masked C·Bᵀ of each chunk, once a group of heads; in ``_scan`` a program owns one
head's state and walks through the chunks, so that no chunk's state ever crosses the memory bus.

dt, decay and the state are float32. A product of a float32 matrix (M, the state, the weighted x) with one of the
model's dtype runs on tensor cores, the float32 matrix split in two bfloat16 ones, which leaves an error of
2^-17; float16 is split as well, because its range would not hold the state. float32 models, and the
interpreter, multiply in float32.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import INTERPRETED, check, padded, rows_apart
from bamba_reference.kernels.step import softplus, step

# Heads whose decays a program computes.
_DECAY_HEADS = 16

# With 8, Triton 3.6 compiles the scan of float16 and 256 columns into one that reads outside its memory.
_WARPS = 4


@dataclass(frozen=True)
class Tuning:
    """Tokens of a chunk, rows of the state a program owns, and in how many stages a chunk's inputs are fetched."""

    chunk: int = 32
    rows: int = 64
    stages: int = 3


# Measured on an H200, 4 × 2,048 tokens of Bamba-9B's heads: chunks of 16, 32, 64 tokens 0.51, 0.36, 0.41 ms.
DEFAULT = Tuning()


def scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    h: Tensor,
    chunk: int,
    fresh: Tensor | None,
    real: Tensor | None,
    *,
    tuning: Tuning = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """``torch_ops.scan``: y (B, L, H, P) in x's dtype and h (B, H, P, N) after the last token, float32.

    x, dt, B and C may be strided along every dimension but the last. ``chunk`` is the caller's choice for
    other backends and changes nothing here.
    """
    check(x)
    if x.shape[1] == 1:
        return step(x, dt, A_log, B, C, D, dt_bias, dt_limit, h, torch.empty_like(h), fresh, real)
    x, B, C, h = rows_apart(x), rows_apart(B), rows_apart(C), h.contiguous()
    rows, L, H, P = x.shape
    G, N = B.shape[2:]
    Q, block, state = padded(L, most=tuning.chunk), padded(P, most=tuning.rows), padded(N)
    chunks = -(-L // Q)
    wide = x.dtype == torch.float32 or INTERPRETED
    segment = None if fresh is None else fresh.cumsum(1, dtype=torch.int32)  # (B, L)
    steps = torch.empty(rows, H, chunks * Q, dtype=torch.float32, device=x.device)
    sums = torch.empty_like(steps)
    _decays[(chunks, -(-H // _DECAY_HEADS), rows)](
        dt, A_log, dt_bias, real, steps, sums, L, H, *dt_limit, *dt.stride(), Q=Q, HEADS=_DECAY_HEADS
    )
    pairs = torch.empty(rows, chunks, G, Q, Q, dtype=torch.float32, device=x.device)
    strides = (*B.stride()[:3], *C.stride()[:3])
    _pairs[(chunks, G, rows)](B, C, segment, pairs, L, N, G, *strides, Q=Q, STATE=state, WIDE=wide)
    y, after = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(h)
    _scan[(H * -(-P // block), rows)](
        x,
        steps,
        sums,
        B,
        C,
        pairs,
        D,
        h,
        segment,
        y,
        after,
        L,
        H,
        P,
        N,
        G,
        H // G,
        *x.stride()[:3],
        *strides,
        Q=Q,
        ROWS=block,
        STATE=state,
        WIDE=wide,
        WHOLE=L % Q == 0 and P % block == 0 and state == N,
        # Three stages of 256 columns do not fit on the chip.
        STAGES=1 if wide else min(tuning.stages, 2 if state > 128 else 3),
        num_warps=_WARPS,
    )
    return y, after


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """a @ b of the model's dtype, exact products summed in float32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _add_dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """total + a @ b, one of them float32 and the other of the model's dtype."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=total, input_precision="ieee")
    else:
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        total = tl.dot(a_high, b_high, acc=total)
        if a.dtype != tl.bfloat16:
            total = tl.dot((a.to(tl.float32) - a_high.to(tl.float32)).to(tl.bfloat16), b_high, acc=total)
        if b.dtype != tl.bfloat16:
            total = tl.dot(a_high, (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16), acc=total)
        return total


@triton.jit
def _decays(
    dt: tl.tensor,
    A_log: tl.tensor,
    dt_bias: tl.tensor,
    real: tl.tensor,
    steps: tl.tensor,
    sums: tl.tensor,
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
    row, t = tl.program_id(2).to(tl.int64), tl.program_id(0) * Q + tl.arange(0, Q)  # (q,)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # (H,)
    here = (t < L)[:, None] & (head < H)[None, :]
    raw = tl.load(
        dt + row * dt_row + t.to(tl.int64)[:, None] * dt_token + head[None, :] * dt_head, mask=here, other=0
    )
    bias = tl.load(dt_bias + head, mask=head < H, other=0).to(tl.float32)
    step = softplus(raw.to(tl.float32) + bias[None, :])
    step = tl.where(here, tl.minimum(tl.maximum(step, low), high), 0)  # (q, H)
    if real is not None:
        counts = tl.load(real + row * L + t, mask=t < L, other=0).to(tl.int32)
        step = tl.where((counts != 0)[:, None], step, 0)
    A = -tl.exp(tl.load(A_log + head, mask=head < H, other=0).to(tl.float32))
    place = (row * H + head[None, :]) * (tl.num_programs(0) * Q) + t[:, None]
    tl.store(steps + place, step, mask=(head < H)[None, :])
    tl.store(sums + place, tl.cumsum(step * A[None, :], axis=0), mask=(head < H)[None, :])


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
    CB = tl.where(visible, _dot(Bs, tl.trans(Cs), WIDE), 0)  # (j, i)
    base = ((row * tl.num_programs(0) + chunk) * G + group) * Q * Q
    tl.store(pairs + base + i[:, None] * Q + i[None, :], CB)


@triton.jit
def _scan(
    x: tl.tensor,
    steps: tl.tensor,
    sums: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    pairs: tl.tensor,
    D: tl.tensor,
    h: tl.tensor,
    segment: tl.tensor,
    y: tl.tensor,
    after: tl.tensor,
    L: tl.tensor,
    H: tl.tensor,
    P: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    heads_a_group: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    B_row: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_row: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0) % H
    group, chunks = head // heads_a_group, tl.cdiv(L, Q)
    p = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)  # (P,)
    n, i = tl.arange(0, STATE), tl.arange(0, Q)  # (N,), (q,)
    skip = tl.load(D + head).to(tl.float32)
    of_state = (row * H + head) * P * N + p[:, None] * N + n[None, :]  # (P, N)
    stored = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(h + of_state, mask=stored, other=0).to(tl.float32)
    x += row * x_row + head * x_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    y += (row * L * H + head) * P
    steps += (row * H + head) * chunks * Q
    sums += (row * H + head) * chunks * Q
    pairs += (row * chunks * G + group) * Q * Q
    before = 0
    if segment is not None:
        segment += row * L
    for start in tl.range(0, L, Q, num_stages=STAGES):
        step, a = tl.load(steps + i), tl.load(sums + i)  # (q,)
        end = tl.load(sums + Q - 1)
        CB = tl.load(pairs + i[:, None] * Q + i[None, :])  # (j, i)
        if WHOLE:
            xs = tl.load(x + i[:, None] * x_token + p[None, :])  # (q, P)
            Bs = tl.load(B + i[:, None] * B_token + n[None, :])  # (q, N)
            Cs = tl.load(C + i[:, None] * C_token + n[None, :])
        else:
            of_head = (start + i < L)[:, None] & (p < P)[None, :]
            of_group = (start + i < L)[:, None] & (n < N)[None, :]
            xs = tl.load(x + i[:, None] * x_token + p[None, :], mask=of_head, other=0)
            Bs = tl.load(B + i[:, None] * B_token + n[None, :], mask=of_group, other=0)
            Cs = tl.load(C + i[:, None] * C_token + n[None, :], mask=of_group, other=0)
        reach, keep, decay = tl.exp(a), tl.exp(end - a) * step, tl.exp(end)
        if segment is not None:
            mine = tl.load(segment + i, mask=start + i < L, other=-1)
            last = tl.load(segment + tl.minimum(Q, L - start) - 1)
            reach = tl.where(mine == before, reach, 0)
            keep = tl.where(mine == last, keep, 0)
            decay = tl.where(last == before, decay, 0)
            before = last
            segment += Q
        # Above the diagonal, where CB is 0, the difference is cut off, because exp might overflow there.
        M = CB * tl.exp(tl.minimum(a[None, :] - a[:, None], 0)) * step[:, None]  # (j, i)
        M = tl.where(i[:, None] == i[None, :], M + skip, M)  # y = … + D x
        Ct, xt = tl.trans(Cs), tl.trans(xs)  # (N, q), (P, q)
        out = _add_dot(state, Ct, tl.zeros((ROWS, Q), tl.float32), WIDE) * reach[None, :]  # (P, q)
        out = _add_dot(xt, M, out, WIDE)
        target = y + i[None, :] * H * P + p[:, None]
        if WHOLE:
            tl.store(target, out.to(y.dtype.element_ty))
        else:
            tl.store(target, out.to(y.dtype.element_ty), mask=(start + i < L)[None, :] & (p < P)[:, None])
        state = _add_dot(xt.to(tl.float32) * keep[None, :], Bs, state * decay, WIDE)  # (P, N)
        x += Q * x_token
        B += Q * B_token
        C += Q * C_token
        y += Q * H * P
        steps += Q
        sums += Q
        pairs += G * Q * Q
    tl.store(after + of_state, state, mask=stored)
