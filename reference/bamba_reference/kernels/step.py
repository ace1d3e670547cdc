"""Mamba-2's recurrence for one token a row in Triton: each state is read once, and may be written in place."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.arithmetic import exp, softplus
from bamba_reference.kernels.launch import check, padded, rows_apart
from bamba_reference.torch.scan import ScanArguments

# Rows of a head's state that a program updates.
_ROWS = 16


def step(arguments: ScanArguments, after: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.scan.scan`` of one token a row, the new state written to ``after``, which may be ``h`` itself.

    h and ``after`` (B, H, P, N), float32 and contiguous: y as x, and ``after``. Raises ``BackendError`` as
    ``launch.check`` does.
    """
    x, dt, A_log, B, C, D, dt_bias, dt_limit, h, _, sequence_starts, real = arguments
    check(x)
    x, B, C = rows_apart(x), rows_apart(B), rows_apart(C)
    rows, _, H, P = x.shape
    G, N = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = padded(P, least=1, most=_ROWS)
    _step[(H, -(-P // block), rows)](
        x,
        dt,
        A_log,
        B,
        C,
        D,
        dt_bias,
        h,
        sequence_starts,
        real,
        y,
        after,
        H,
        P,
        N,
        H // G,
        *dt_limit,
        x.stride(0),
        x.stride(2),
        dt.stride(0),
        dt.stride(2),
        B.stride(0),
        B.stride(2),
        C.stride(0),
        C.stride(2),
        ROWS=block,
        STATE=padded(N),
    )
    return y, after


@triton.jit
def _step(
    x: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    h: tl.tensor,
    sequence_starts: tl.tensor,
    real: tl.tensor,
    y: tl.tensor,
    after: tl.tensor,
    H: tl.tensor,
    P: tl.tensor,
    N: tl.tensor,
    heads_a_group: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    dt_row: tl.tensor,
    dt_head: tl.tensor,
    B_row: tl.tensor,
    B_group: tl.tensor,
    C_row: tl.tensor,
    C_group: tl.tensor,
    ROWS: tl.constexpr,
    STATE: tl.constexpr,
) -> None:
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(0)
    group = head // heads_a_group
    p, n = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, STATE)  # (P,), (N,)
    of_state = (row * H + head) * P * N + p[:, None] * N + n[None, :]  # (P, N)
    stored = (p < P)[:, None] & (n < N)[None, :]
    hs = tl.load(h + of_state, mask=stored, other=0).to(tl.float32)
    A = -exp(tl.load(A_log + head).to(tl.float32))
    step = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.minimum(tl.maximum(softplus(step), low), high)
    if real is not None:
        step = tl.where(tl.load(real + row).to(tl.int32) != 0, step, 0)
    decay = tl.exp(step * A)
    if sequence_starts is not None:
        decay = tl.where(tl.load(sequence_starts + row).to(tl.int32) != 0, 0, decay)
    xs = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0).to(tl.float32)  # (P,)
    Bs = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0).to(tl.float32)  # (N,)
    Cs = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0).to(tl.float32)
    hs = hs * decay + (step * xs)[:, None] * Bs[None, :]  # (P, N)
    out = tl.sum(hs * Cs[None, :], axis=1) + tl.load(D + head).to(tl.float32) * xs  # (P,)
    tl.store(y + (row * H + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)
    tl.store(after + of_state, hs, mask=stored)
