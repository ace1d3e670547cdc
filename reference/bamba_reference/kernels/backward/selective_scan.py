"""Mamba's selective scan with gradients: ``kernels.selective_scan`` forward, and backward a walk from the last token.

Only inputs are kept. The states before every few tokens are computed again, chunks in parallel as in the forward pass;
from them a program recomputes the states of those tokens in registers. The gradient of the state goes through the
tokens as the state does, in the other direction: a first run finds what each chunk adds to nothing, the forward pass's
``_pass_on`` what each chunk begins with, and a second run starts from that. Sums over channels, for B and C, and over
tokens, for A, D and dt's bias, are sums of partial sums, always in the same order.
"""
# Triton's own meaning of this syntax: tuples grow by adding.
# mypy: disable-error-code="misc, untyped-decorator, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels import selective_scan as forward
from bamba_reference.kernels.arithmetic import LOG2_E, exp, softplus
from bamba_reference.kernels.launch import padded, rows_apart
from bamba_reference.kernels.selective_scan import SelectiveScanTuning
from bamba_reference.torch.scan import SelectiveScanArguments

# Tokens whose states a program holds in registers. One warp would have too few registers: compiled for an H200, 16
# states of 32 channels take 1,168 bytes a thread of its stack with 1 warp, and 184 with 2.
DEFAULT = replace(forward.DEFAULT, tokens=8, warps=2)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def selective_scan(arguments: SelectiveScanArguments) -> tuple[Tensor, Tensor]:
    """``torch.scan.selective_scan``: y (B, L, I) in z's dtype and h (B, I, N) after the last token, float32."""
    y, h = _SelectiveScan.apply(*arguments)
    return y, h


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.chunk, sequence_starts, real = arguments
        ctx.save_for_backward(*tensors, sequence_starts, real)
        return forward.selective_scan(SelectiveScanArguments._make(arguments))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_h: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sequence_starts, real = ctx.saved_tensors
        arguments = SelectiveScanArguments._make((*tensors, ctx.chunk, sequence_starts, real))
        return *gradients(arguments, of_y, of_h), None, None, None


def gradients(
    arguments: SelectiveScanArguments, of_y: Tensor, of_h: Tensor, *, tuning: SelectiveScanTuning = DEFAULT
) -> tuple[Tensor, ...]:
    """Gradients of the arguments' first nine tensors, x to h, from those of y and of the last h."""
    given = arguments[:9]
    arguments, of_y = forward.laid_out(arguments), rows_apart(of_y)
    x, dt, A_log, B, C, D, z, dt_bias, _, _, sequence_starts, real = arguments
    (rows, L, inner), N = x.shape, B.shape[-1]
    tokens, state, blocks = (
        min(tuning.tokens, padded(L, least=1)),
        padded(N, least=1),
        -(-inner // tuning.channels),
    )
    length = tuning.chunk(rows, L, inner)
    chunks = -(-L // length)
    marks = forward.chunk_begins(arguments, tokens, forward.DEFAULT)  # (B, marks, N, I)
    # The last chunk first; each one's is what the tokens after it leave.
    ends = marks.new_empty(rows, chunks, N, inner)
    ends[:, 0] = of_h.transpose(1, 2)

    def run(spans: Tensor | None, *found: Tensor | None) -> None:
        _walk_back[(blocks, chunks if spans is None else chunks - 1, rows)](
            x, dt, A_log, B, C, D, z, dt_bias, of_y, marks, ends, spans, sequence_starts, real, *found,
            L, inner, N, length, chunks, *forward.strides(x, dt, B, C, z, of_y),
            CHANNELS=tuning.channels, STATE=state, TOKENS=tokens,
            num_warps=max(tuning.warps, state // 8),
        )  # fmt: skip

    if chunks > 1:
        spans = marks.new_empty(rows, chunks - 1, inner)
        run(spans, *[None] * 9)
        forward.pass_on(A_log, ends, spans, tuning)
    to_x, to_dt, to_z = (torch.empty(v.shape, dtype=v.dtype, device=x.device) for v in (x, dt, z))
    of_B, of_C = marks.new_empty(2, blocks, rows, L, N)
    of_A, of_D, of_bias = (marks.new_empty(rows, chunks, *size, inner) for size in ((N,), (), ()))
    to_h = marks.new_empty(rows, N, inner)
    run(None, to_x, to_dt, to_z, of_B, of_C, of_A, of_D, of_bias, to_h)
    sums = (of_A.sum((0, 1)).t(), of_B.sum(0), of_C.sum(0), of_D.sum((0, 1)), of_bias.sum((0, 1)))
    to_A, to_B, to_C, to_D, to_bias = sums
    found = (to_x, to_dt, to_A, to_B, to_C, to_D, to_z, to_bias, to_h.transpose(1, 2))
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(found, given, strict=True))


@triton.jit
def _walk_back(
    x: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    gradient: tl.tensor,
    marks: tl.tensor,
    ends: tl.tensor,
    spans: tl.tensor,
    sequence_starts: tl.tensor,
    real: tl.tensor,
    to_x: tl.tensor,
    to_dt: tl.tensor,
    to_z: tl.tensor,
    of_B: tl.tensor,
    of_C: tl.tensor,
    of_A: tl.tensor,
    of_D: tl.tensor,
    of_bias: tl.tensor,
    to_h: tl.tensor,
    L: tl.tensor,
    inner: tl.tensor,
    N: tl.tensor,
    length: tl.tensor,
    chunks: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    dt_row: tl.tensor,
    dt_token: tl.tensor,
    B_row: tl.tensor,
    B_token: tl.tensor,
    C_row: tl.tensor,
    C_token: tl.tensor,
    z_row: tl.tensor,
    z_token: tl.tensor,
    gradient_row: tl.tensor,
    gradient_token: tl.tensor,
    CHANNELS: tl.constexpr,
    STATE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """With to_x all gradients of a chunk; else what the state's gains from zero, and the dt it spans."""
    row, c = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATE)  # (I,), (N,)
    mine = i < inner
    stored = mine[None, :] & (n < N)[:, None]
    of_state = n[:, None] * inner + i[None, :]  # (N, I)
    # Decays are powers of 2, of which 1 stands where there is no state.
    A = tl.where(stored, -LOG2_E * exp(tl.load(A_log + of_state, mask=stored, other=0).to(tl.float32)), 0)
    bias = tl.load(dt_bias + i, mask=mine, other=0).to(tl.float32)  # (I,)
    span = tl.zeros((CHANNELS,), tl.float32)
    g = tl.zeros((STATE, CHANNELS), tl.float32)  # of the state after the token
    if to_x is None:
        c += 1
    else:
        g = tl.load(ends + (row * chunks + chunks - 1 - c) * inner * N + of_state, mask=stored, other=0)
        skip = tl.load(D + i, mask=mine, other=0).to(tl.float32)
        sum_A = tl.zeros((STATE, CHANNELS), tl.float32)
        sum_D, sum_bias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
        of_B += (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row) * L * N
        of_C += (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row) * L * N
    x += row * x_row
    dt += row * dt_row
    B += row * B_row
    C += row * C_row
    z += row * z_row
    gradient += row * gradient_row
    few = tl.cdiv(tl.minimum(L - c * length, length), TOKENS)
    for back in range(few):
        start = c * length + (few - 1 - back) * TOKENS
        raws, steps, begins, befores = (), (), (), ()
        if to_x is not None:
            at = (row * tl.cdiv(L, TOKENS) + start // TOKENS) * inner * N
            h = tl.load(marks + at + of_state, mask=stored, other=0).to(tl.float32)
        for k in tl.static_range(TOKENS):
            t = start + k
            raw = tl.load(dt + t * dt_token + i, mask=mine & (t < L), other=0).to(tl.float32) + bias
            step = tl.where(t < L, softplus(raw), 0)
            if real is not None:
                step = tl.where(tl.load(real + row * L + t, mask=t < L, other=0).to(tl.int32) != 0, step, 0)
            begun = t < 0
            if sequence_starts is not None:
                begun = tl.load(sequence_starts + row * L + t, mask=t < L, other=0).to(tl.int32) != 0
            raws, steps, begins = raws + (raw,), steps + (step,), begins + (begun,)
            if to_x is not None:
                xk = tl.load(x + t * x_token + i, mask=mine & (t < L), other=0).to(tl.float32)
                Bk = tl.load(B + t * B_token + n, mask=(n < N) & (t < L), other=0).to(tl.float32)
                befores = befores + (h,)
                h = h * tl.where(begun, 0, tl.exp2(step[None, :] * A)) + (step * xk)[None, :] * Bk[:, None]
        for j in tl.static_range(TOKENS):
            t, step, begun = start + TOKENS - 1 - j, steps[TOKENS - 1 - j], begins[TOKENS - 1 - j]
            here, column = mine & (t < L), (n < N) & (t < L)
            gate = tl.load(z + t * z_token + i, mask=here, other=0).to(tl.float32)
            of_y = tl.load(gradient + t * gradient_token + i, mask=here, other=0).to(tl.float32)
            Ck = tl.load(C + t * C_token + n, mask=column, other=0).to(tl.float32)
            sigmoid = 1 / (1 + tl.exp(-gate))
            d = of_y * gate * sigmoid  # of h C + D x
            g += d[None, :] * Ck[:, None]
            decay = tl.where(begun, 0, tl.exp2(step[None, :] * A))  # (N, I)
            span += step
            span = tl.where(begun, float("inf"), span)
            if to_x is not None:
                xk = tl.load(x + t * x_token + i, mask=here, other=0).to(tl.float32)
                Bk = tl.load(B + t * B_token + n, mask=column, other=0).to(tl.float32)
                kept = befores[TOKENS - 1 - j] * decay  # (N, I)
                after = kept + (step * xk)[None, :] * Bk[:, None]
                out = tl.sum(after * Ck[:, None], axis=0) + skip * xk
                of_gate = of_y * out * sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(to_z + (row * L + t) * inner + i, of_gate.to(to_z.dtype.element_ty), mask=here)
                tl.store(of_C + t * N + n, tl.sum(after * d[None, :], axis=1), mask=column)
                tl.store(of_B + t * N + n, tl.sum(g * (step * xk)[None, :], axis=1), mask=column)
                from_B = tl.sum(g * Bk[:, None], axis=0)  # (I,)
                of_x = d * skip + from_B * step
                tl.store(to_x + (row * L + t) * inner + i, of_x.to(to_x.dtype.element_ty), mask=here)
                kept *= g
                of_step = from_B * xk + _LN_2 * tl.sum(kept * A, axis=0)
                of_raw = tl.where(step > 0, of_step / (1 + tl.exp(-raws[TOKENS - 1 - j])), 0)
                tl.store(to_dt + (row * L + t) * inner + i, of_raw.to(to_dt.dtype.element_ty), mask=here)
                sum_A += kept * step[None, :]
                sum_D += d * xk
                sum_bias += of_raw
            g *= decay
    if to_x is None:
        tl.store(ends + (row * chunks + chunks - c) * inner * N + of_state, g, mask=stored)
        tl.store(spans + (row * (chunks - 1) + chunks - 1 - c) * inner + i, span, mask=mine)
    else:
        at = row * chunks + c
        tl.store(of_A + at * inner * N + of_state, sum_A * A * _LN_2, mask=stored)
        tl.store(of_D + at * inner + i, sum_D, mask=mine)
        tl.store(of_bias + at * inner + i, sum_bias, mask=mine)
        tl.store(to_h + row * inner * N + of_state, g, mask=stored & (c == 0))
