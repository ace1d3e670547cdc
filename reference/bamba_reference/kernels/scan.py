"""Mamba-2's recurrence in Triton: ``torch.scan.scan`` with the state in registers.

The tokens are cut into chunks (Dao and Gu 2024, section 6), for which ``chunks`` computes the decays and the masked
C·Bᵀ. Then one program per head walks through the chunks, so that no chunk's state is written to memory.

dt, decay and the state are float32. A product of a float32 matrix (M, the state, the weighted x) with one of the
model's dtype runs on tensor cores, the float32 matrix split in two bfloat16 ones, which leaves an error of
2^-17; float16 is split as well, because its range would not hold the state. float32 models, and the
interpreter, multiply in float32.
"""
# Triton's own meaning of this syntax: tuples grow by adding.
# mypy: disable-error-code="untyped-decorator, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.arithmetic import load
from bamba_reference.kernels.chunks import decays, pairs
from bamba_reference.kernels.launch import INTERPRETED, check, padded, rows_apart
from bamba_reference.kernels.step import step
from bamba_reference.torch.scan import ScanArguments

# With 8, Triton 3.6 compiles the scan of float16 and 256 columns into one that reads outside its memory.
_WARPS = 4


@dataclass(frozen=True)
class ScanTuning:
    """How a program walks through the chunks.

    ``chunk`` tokens at a time, with ``rows`` of the state, whose columns it multiplies ``columns`` at a time: of fewer
    the two bfloat16 halves need fewer registers. A chunk's inputs are fetched in ``stages``.
    """

    chunk: int = 32
    rows: int = 64
    columns: int = 64
    stages: int = 3


# Measured on an H200, 4 × 2,048 tokens of Bamba-9B's heads: chunks of 16, 32, 64 tokens 0.47, 0.28, 0.43 ms; columns
# of 32, 64, 128 in chunks of 32 tokens 0.30, 0.27, 0.28 ms.
DEFAULT = ScanTuning()


def scan(
    arguments: ScanArguments,
    *,
    tuning: ScanTuning = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """``torch.scan.scan``: y (B, L, H, P) in x's dtype and h (B, H, P, N) after the last token, float32.

    x, dt, B and C may be strided along every dimension but the last. ``chunk`` is not used.
    """
    x, dt, A_log, B, C, D, dt_bias, dt_limit, h, _, sequence_starts, real = arguments
    check(x)
    h = h.contiguous()
    if x.shape[1] == 1:
        return step(arguments._replace(h=h), torch.empty_like(h))
    x, B, C = rows_apart(x), rows_apart(B), rows_apart(C)
    rows, L, H, P = x.shape
    G, N = B.shape[2:]
    Q, block, state = padded(L, most=tuning.chunk), padded(P, most=tuning.rows), padded(N)
    wide = x.dtype == torch.float32 or INTERPRETED
    segment = None if sequence_starts is None else sequence_starts.cumsum(1, dtype=torch.int32)  # (B, L)
    decay = decays(dt, A_log, dt_bias, dt_limit, real, Q)
    y, after = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(h)
    _scan[(H * -(-P // block), rows)](
        x,
        decay.steps,
        decay.sums,
        decay.reaches,
        decay.keeps,
        B,
        C,
        pairs(B, C, segment, Q, state, wide),
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
        *B.stride()[:3],
        *C.stride()[:3],
        Q=Q,
        ROWS=block,
        COLUMNS=min(tuning.columns, state),
        PARTS=max(1, state // tuning.columns),
        WIDE=wide,
        WHOLE=L % Q == 0 and P % block == 0 and state == N,
        # Three stages of 256 columns do not fit on the chip.
        STAGES=1 if wide else min(tuning.stages, 2 if state > 128 else 3),
        num_warps=_WARPS,
    )
    return y, after


@triton.jit
def add_dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
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
def _scan(
    x: tl.tensor,
    steps: tl.tensor,
    sums: tl.tensor,
    reaches: tl.tensor,
    keeps: tl.tensor,
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
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0) % H
    group, chunks = head // heads_a_group, tl.cdiv(L, Q)
    p = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)  # (P,)
    n, i = tl.arange(0, COLUMNS), tl.arange(0, Q)  # (n,), (q,)
    skip = tl.load(D + head).to(tl.float32)
    of_state = (row * H + head) * P * N + p[:, None] * N + n[None, :]  # (P, n)
    states = ()
    for k in tl.static_range(PARTS):
        stored = (p < P)[:, None] & (k * COLUMNS + n < N)[None, :]
        states = states + (load(h + of_state + k * COLUMNS, stored, WHOLE).to(tl.float32),)
    x += row * x_row + head * x_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    y += (row * L * H + head) * P
    at = (row * H + head) * chunks * Q
    pairs += (row * chunks * G + group) * Q * Q
    before = 0
    if segment is not None:
        segment += row * L
    for start in tl.range(0, L, Q, num_stages=STAGES):
        step, a = tl.load(steps + at + i), tl.load(sums + at + i)  # (q,)
        reach, keep = tl.load(reaches + at + i), tl.load(keeps + at + i)  # (q,)
        decay = tl.load(reaches + at + Q - 1)
        CB = tl.load(pairs + i[:, None] * Q + i[None, :])  # (j, i)
        of_head = (start + i < L)[:, None] & (p < P)[None, :]
        xs = load(x + i[:, None] * x_token + p[None, :], of_head, WHOLE)  # (q, P)
        if segment is not None:
            mine = tl.load(segment + i, mask=start + i < L, other=-1)
            last = tl.load(segment + tl.minimum(Q, L - start) - 1)
            reach = tl.where(mine == before, reach, 0)
            keep = tl.where(mine == last, keep, 0)
            decay = tl.where(last == before, decay, 0)
            before = last
            segment += Q
        # Above the diagonal, where CB is 0, the difference is cut off, because its power might overflow there.
        M = CB * tl.exp2(tl.minimum(a[None, :] - a[:, None], 0)) * step[:, None]  # (j, i)
        M = tl.where(i[:, None] == i[None, :], M + skip, M)  # y = … + D x
        xt = tl.trans(xs)  # (P, q)
        kept = xt.to(tl.float32) * keep[None, :]
        out, ends = tl.zeros((ROWS, Q), tl.float32), ()
        for k in tl.static_range(PARTS):
            c = k * COLUMNS + n  # (n,)
            of_group = (start + i < L)[:, None] & (c < N)[None, :]
            Cs = load(C + i[:, None] * C_token + c[None, :], of_group, WHOLE)  # (q, n)
            out = add_dot(states[k], tl.trans(Cs), out, WIDE)  # (P, q)
            Bs = load(B + i[:, None] * B_token + c[None, :], of_group, WHOLE)  # (q, n)
            ends = ends + (add_dot(kept, Bs, states[k] * decay, WIDE),)  # (P, n)
        states = ends
        out = add_dot(xt, M, out * reach[None, :], WIDE)
        target = y + i[None, :] * H * P + p[:, None]
        if WHOLE:
            tl.store(target, out.to(y.dtype.element_ty))
        else:
            tl.store(target, out.to(y.dtype.element_ty), mask=(start + i < L)[None, :] & (p < P)[:, None])
        x += Q * x_token
        B += Q * B_token
        C += Q * C_token
        y += Q * H * P
        at += Q
        pairs += G * Q * Q
    for k in tl.static_range(PARTS):
        stored = (p < P)[:, None] & (k * COLUMNS + n < N)[None, :]
        tl.store(after + of_state + k * COLUMNS, states[k], mask=stored)
