"""The Mamba-2 state-space recurrence in one Triton kernel: ``torch_ops.scan`` with the state kept on the chip.

A program owns some rows of one head's state and walks through the tokens chunk by chunk (Dao and Gu 2024,
section 6): softplus, cumulative decay, the chunk's own part, the state's part and the next state happen in
registers, and what crosses the memory bus is x, dt, B and C once and y once. No chunk's state is ever stored.

dt, decay and the state are float32. A product of a float32 matrix (the masked C·Bᵀ, the state, the weighted x)
with one of the model's dtype runs on tensor cores in the way ``PRODUCT`` names:

- ``split``: the float32 matrix as the sum of two of the model's dtype, which leaves an error of 2^-17 (bfloat16);
- ``tf32``: rounded to 11 bits;
- ``plain``: rounded to the model's dtype, as mamba_ssm does;
- ``ieee``: in float32 without tensor cores, for float32 models and the interpreter.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import INTERPRETED, padded, rows_apart

# Rows of a head's state that a program of the one-token kernel updates.
_STEP_ROWS = 16


@dataclass(frozen=True)
class Tuning:
    """How the scan is cut: tokens of a chunk, rows of the state a program owns, and the launch's two numbers."""

    chunk: int = 64
    rows: int = 64
    warps: int = 4
    stages: int = 1
    product: str | None = None


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
    if x.shape[1] == 1:
        return step(x, dt, A_log, B, C, D, dt_bias, dt_limit, h, torch.empty_like(h), fresh, real)
    x, B, C = rows_apart(x), rows_apart(B), rows_apart(C)
    rows, L, H, P = x.shape
    G, N = B.shape[2:]
    y, after = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(h)
    block = padded(P, most=tuning.rows)
    _scan[(H * -(-P // block), rows)](
        x,
        dt,
        A_log,
        B,
        C,
        D,
        dt_bias,
        h.contiguous(),
        fresh,
        real,
        y,
        after,
        L,
        H,
        P,
        N,
        H // G,
        *dt_limit,
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        Q=padded(L, most=tuning.chunk),
        ROWS=block,
        STATE=padded(N),
        PRODUCT=tuning.product or product_of(x.dtype),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    return y, after


def step(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    h: Tensor,
    after: Tensor,
    fresh: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``scan`` of one token a row, the new state written to ``after``, which may be ``h`` itself."""
    x, B, C = rows_apart(x), rows_apart(B), rows_apart(C)
    rows, _, H, P = x.shape
    G, N = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = padded(P, least=1, most=_STEP_ROWS)
    _step[(H, -(-P // block), rows)](
        x,
        dt,
        A_log,
        B,
        C,
        D,
        dt_bias,
        h.contiguous(),
        fresh,
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


def product_of(dtype: torch.dtype) -> str:
    """The product that keeps float32 operands' digits and still runs on tensor cores where the model's dtype does."""
    if INTERPRETED or dtype == torch.float32:
        return "ieee"
    return "split" if dtype == torch.bfloat16 else "tf32"


@triton.jit
def _softplus(v: tl.tensor) -> tl.tensor:
    """log(1 + e^v) without overflow, to the last digits also where e^v is small (Kahan's log1p)."""
    small = tl.exp(-tl.abs(v))
    above = 1 + small
    log1p = tl.where(above == 1, small, tl.log(above) * (small / tl.where(above == 1, 1, above - 1)))
    return tl.maximum(v, 0) + log1p


@triton.jit
def _times_exact(wide: tl.tensor, exact: tl.tensor, PRODUCT: tl.constexpr) -> tl.tensor:
    """wide @ exact, wide float32, exact of the model's dtype."""
    if PRODUCT == "split":
        high = wide.to(exact.dtype)
        low = (wide - high.to(tl.float32)).to(exact.dtype)
        return tl.dot(low, exact, acc=tl.dot(high, exact))
    elif PRODUCT == "plain":
        return tl.dot(wide.to(exact.dtype), exact)
    else:
        return tl.dot(wide, exact.to(tl.float32), input_precision=PRODUCT)


@triton.jit
def _exact_times(exact: tl.tensor, wide: tl.tensor, PRODUCT: tl.constexpr) -> tl.tensor:
    """exact @ wide, wide float32, exact of the model's dtype."""
    if PRODUCT == "split":
        high = wide.to(exact.dtype)
        low = (wide - high.to(tl.float32)).to(exact.dtype)
        return tl.dot(exact, low, acc=tl.dot(exact, high))
    elif PRODUCT == "plain":
        return tl.dot(exact, wide.to(exact.dtype))
    else:
        return tl.dot(exact.to(tl.float32), wide, input_precision=PRODUCT)


@triton.jit
def _scan(
    x: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    h: tl.tensor,
    fresh: tl.tensor,
    real: tl.tensor,
    y: tl.tensor,
    after: tl.tensor,
    L: tl.tensor,
    H: tl.tensor,
    P: tl.tensor,
    N: tl.tensor,
    heads_a_group: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    dt_row: tl.tensor,
    dt_token: tl.tensor,
    dt_head: tl.tensor,
    B_row: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_row: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    STATE: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0) % H
    group = head // heads_a_group
    p = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)  # (P,)
    n, i = tl.arange(0, STATE), tl.arange(0, Q)  # (N,), (q,)
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    of_state = (row * H + head) * P * N + p[None, :] * N + n[:, None]  # (N, P)
    stored = (p < P)[None, :] & (n < N)[:, None]
    hT = tl.load(h + of_state, mask=stored, other=0).to(tl.float32)  # (N, P)
    x += row * x_row + head * x_head
    dt += row * dt_row + head * dt_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    for start in range(0, L, Q):
        t = (start + i).to(tl.int64)  # (q,)
        inside = t < L
        step = _softplus(tl.load(dt + t * dt_token, mask=inside, other=0).to(tl.float32) + bias)
        step = tl.where(inside, tl.minimum(tl.maximum(step, low), high), 0)  # (q,)
        if real is not None:
            step = tl.where(tl.load(real + row * L + t, mask=inside, other=0).to(tl.int32) != 0, step, 0)
        a = tl.cumsum(step * A, axis=0)  # (q,)
        end = tl.sum(step * A, axis=0)
        xs = tl.load(
            x + t[:, None] * x_token + p[None, :], mask=inside[:, None] & (p < P)[None, :], other=0
        )  # (q, P)
        of_group = inside[:, None] & (n < N)[None, :]
        Bs = tl.load(B + t[:, None] * B_token + n[None, :], mask=of_group, other=0)  # (q, N)
        Cs = tl.load(C + t[:, None] * C_token + n[None, :], mask=of_group, other=0)  # (q, N)
        # Above the diagonal the difference is cut off, because exp might overflow there.
        M = tl.exp(tl.minimum(a[:, None] - a[None, :], 0)) * step[None, :]  # (q, q)
        visible = i[:, None] >= i[None, :]
        reach, keep, decay = tl.exp(a), tl.exp(tl.minimum(end - a, 0)) * step, tl.exp(end)
        if fresh is not None:
            begins = tl.load(fresh + row * L + t, mask=inside, other=0).to(tl.int32)
            segment = tl.cumsum(begins, axis=0)  # (q,)
            last = tl.sum(begins, axis=0)
            visible = visible & (segment[:, None] == segment[None, :])
            reach = tl.where(segment == 0, reach, 0)
            keep = tl.where(segment == last, keep, 0)
            decay = tl.where(last == 0, decay, 0)
        if PRODUCT == "ieee":
            CB = tl.dot(Cs.to(tl.float32), tl.trans(Bs.to(tl.float32)), input_precision="ieee")
        else:
            CB = tl.dot(Cs, tl.trans(Bs))  # (q, q)
        M = tl.where(visible, M * CB, 0)
        out = _exact_times(Cs, hT, PRODUCT) * reach[:, None]  # (q, P)
        out += _times_exact(M, xs, PRODUCT)
        wide = xs.to(tl.float32)
        out += skip * wide
        tl.store(
            y + ((row * L + t[:, None]) * H + head) * P + p[None, :],
            out.to(y.dtype.element_ty),
            mask=inside[:, None] & (p < P)[None, :],
        )
        hT = hT * decay + _exact_times(tl.trans(Bs), wide * keep[:, None], PRODUCT)  # (N, P)
    tl.store(after + of_state, hT, mask=stored)


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
    fresh: tl.tensor,
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
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    step = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.minimum(tl.maximum(_softplus(step), low), high)
    if real is not None:
        step = tl.where(tl.load(real + row).to(tl.int32) != 0, step, 0)
    decay = tl.exp(step * A)
    if fresh is not None:
        decay = tl.where(tl.load(fresh + row).to(tl.int32) != 0, 0, decay)
    xs = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0).to(tl.float32)  # (P,)
    Bs = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0).to(tl.float32)  # (N,)
    Cs = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0).to(tl.float32)
    hs = hs * decay + (step * xs)[:, None] * Bs[None, :]  # (P, N)
    out = tl.sum(hs * Cs[None, :], axis=1) + tl.load(D + head).to(tl.float32) * xs  # (P,)
    tl.store(y + (row * H + head) * P + p, out.to(y.dtype.element_ty), mask=p < P)
    tl.store(after + of_state, hs, mask=stored)
