"""Mamba's recurrence in Triton: ``torch.scan.selective_scan`` with the states in registers.

A program keeps the states of some channels and walks through a chunk of tokens, which it fetches a few at a time so
that the loads overlap. Where rows and channels do not fill a GPU, the tokens are cut into chunks that run in parallel:
a first run computes each chunk's final state from a zero state, ``_pass_on`` turns these into the states that the
chunks begin with, and a second run starts from them. dt, decays, states and sums are float32.
"""
# Triton's own meaning of this syntax: tuples grow by adding.
# mypy: disable-error-code="untyped-decorator, assignment, unreachable"
# ruff: noqa: RUF005

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.arithmetic import LOG2_E, exp, load, softplus
from bamba_reference.kernels.launch import INTERPRETED, check, padded, rows_apart
from bamba_reference.torch.scan import SelectiveScanArguments


@dataclass(frozen=True)
class SelectiveScanTuning:
    """Channels of a program, tokens it fetches together, its warps.

    ``programs`` of them fill a GPU; a chunk has ``least`` to ``most`` tokens.
    """

    channels: int = 32
    tokens: int = 4
    warps: int = 1
    programs: int = 2048
    least: int = 64
    most: int = 128

    def chunk(self, rows: int, L: int, inner: int) -> int:
        """Tokens of a chunk, whole fetches of them: as few chunks as fill the GPU, and none too long for float32.

        Decays multiplied token by token accumulate rounding errors; the decay of a whole chunk is rounded once.
        """
        chunks = -(-self.programs // (rows * -(-inner // self.channels)))
        tokens = min(max(-(-L // chunks), self.least), self.most)
        return -(-tokens // self.tokens) * self.tokens


# The interpreter's time is that of the programs, whatever their size.
DEFAULT = SelectiveScanTuning(channels=256) if INTERPRETED else SelectiveScanTuning()


def selective_scan(
    arguments: SelectiveScanArguments,
    *,
    tuning: SelectiveScanTuning = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """``torch.scan.selective_scan``: y (B, L, I) in z's dtype and h (B, I, N) after the last token, float32, stored
    as (B, N, I), the order in which the kernel reads it.

    All inputs may be strided along every dimension but the last. ``chunk`` is not used.
    """
    check(arguments.x)
    arguments = laid_out(arguments)
    rows, L, inner = arguments.x.shape
    length = tuning.chunk(rows, L, inner)
    begins = chunk_begins(arguments, length, tuning)
    y = torch.empty(arguments.x.shape, dtype=arguments.z.dtype, device=arguments.x.device)
    after = torch.empty(rows, begins.shape[2], inner, dtype=torch.float32, device=y.device)
    _launch(arguments, begins, length, tuning, y=y, after=after)
    return y, after.transpose(1, 2)


def laid_out(arguments: SelectiveScanArguments) -> SelectiveScanArguments:
    """The arguments as the kernels read them: rows contiguous, A_log (N, I) and h (B, N, I).

    Channels are neighbours in memory, so that a thread has one channel and sums its states alone.
    """
    x, dt, B, C, z = (
        rows_apart(v) for v in (arguments.x, arguments.dt, arguments.B, arguments.C, arguments.z)
    )
    A_log, h = arguments.A_log.t().contiguous(), arguments.h.transpose(1, 2).contiguous()
    return arguments._replace(x=x, dt=dt, A_log=A_log, B=B, C=C, z=z, h=h)


def chunk_begins(arguments: SelectiveScanArguments, length: int, tuning: SelectiveScanTuning) -> Tensor:
    """The states (B, chunks, N, I), float32, before each chunk of ``length`` tokens, of arguments laid out."""
    (rows, L, inner), N = arguments.x.shape, arguments.B.shape[-1]
    chunks = -(-L // length)
    begins = arguments.h[:, None]
    if chunks > 1:
        begins = torch.cat([begins, begins.new_empty(rows, chunks - 1, N, inner)], dim=1)
        spans = begins.new_empty(rows, chunks - 1, inner)
        _launch(arguments, begins, length, tuning, spans=spans)
        pass_on(arguments.A_log, begins, spans, tuning)
    return begins


def pass_on(A_log: Tensor, begins: Tensor, spans: Tensor, tuning: SelectiveScanTuning) -> None:
    """``_pass_on`` over begins (B, chunks, N, I), by spans (B, chunks - 1, I)."""
    rows, chunks, N, inner = begins.shape
    _pass_on[(-(-inner // tuning.channels), rows)](
        A_log, begins, spans, inner, N, chunks,
        CHANNELS=tuning.channels, STATE=padded(N, least=1), num_warps=tuning.warps,
    )  # fmt: skip


def _launch(
    arguments: SelectiveScanArguments,
    begins: Tensor,
    length: int,
    tuning: SelectiveScanTuning,
    *,
    y: Tensor | None = None,
    after: Tensor | None = None,
    spans: Tensor | None = None,
) -> None:
    x, dt, A_log, B, C, D, z, dt_bias, _, _, sequence_starts, real = arguments
    rows, L, inner = x.shape
    N, chunks, state = B.shape[-1], begins.shape[1], padded(B.shape[-1], least=1)
    tokens = min(tuning.tokens, padded(L, least=1))
    _run[(-(-inner // tuning.channels), chunks if spans is None else chunks - 1, rows)](
        x, dt, A_log, B, C, D, z, dt_bias, begins, sequence_starts, real, y, after, spans,
        L, inner, N, length, chunks, *strides(x, dt, B, C, z),
        CHANNELS=tuning.channels, STATE=state, TOKENS=tokens, num_warps=tuning.warps,
        WHOLE=L % tokens == 0 and inner % tuning.channels == 0 and state == N,
    )  # fmt: skip


def strides(*tensors: Tensor) -> list[int]:
    """Those along rows and tokens."""
    return [stride for v in tensors for stride in v.stride()[:2]]


@triton.jit
def _run(
    x: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    begins: tl.tensor,
    sequence_starts: tl.tensor,
    real: tl.tensor,
    y: tl.tensor,
    after: tl.tensor,
    spans: tl.tensor,
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
    CHANNELS: tl.constexpr,
    STATE: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """With y a chunk's outputs, and the state after the last; else what it adds to nothing and the dt it spans."""
    row, c = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATE)  # (I,), (N,)
    mine = i < inner
    stored = mine[None, :] & (n < N)[:, None]
    of_state = n[:, None] * inner + i[None, :]  # (N, I)
    # Decays are powers of 2, of which 1 stands where there is no state.
    A = tl.where(stored, -LOG2_E * exp(tl.load(A_log + of_state, mask=stored, other=0).to(tl.float32)), 0)
    bias = tl.load(dt_bias + i, mask=mine, other=0).to(tl.float32)  # (I,)
    hs = tl.zeros((STATE, CHANNELS), tl.float32)
    skip, span = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    if y is not None:
        hs = tl.load(begins + (row * chunks + c) * inner * N + of_state, mask=stored, other=0).to(tl.float32)
        skip = tl.load(D + i, mask=mine, other=0).to(tl.float32)
        C += row * C_row + c * length * C_token
        z += row * z_row + c * length * z_token
        y += (row * L + c * length) * inner
    x += row * x_row + c * length * x_token
    dt += row * dt_row + c * length * dt_token
    B += row * B_row + c * length * B_token
    if sequence_starts is not None:
        sequence_starts += row * L + c * length
    if real is not None:
        real += row * L + c * length
    left = tl.minimum(L - c * length, length)
    for start in range(0, left, TOKENS):
        xs, steps, Bs, Cs, zs = (), (), (), (), ()
        for k in tl.static_range(TOKENS):
            here, column = mine & (start + k < left), (n < N) & (start + k < left)
            xs = xs + (load(x + k * x_token + i, here, WHOLE),)
            steps = steps + (load(dt + k * dt_token + i, here, WHOLE),)
            Bs = Bs + (load(B + k * B_token + n, column, WHOLE),)
            if y is not None:
                Cs = Cs + (load(C + k * C_token + n, column, WHOLE),)
                zs = zs + (load(z + k * z_token + i, here, WHOLE),)
        for k in tl.static_range(TOKENS):
            within = start + k < left
            step = softplus(steps[k].to(tl.float32) + bias)  # (I,)
            if not WHOLE:
                step = tl.where(within, step, 0)
            if real is not None:
                step = tl.where(tl.load(real + k, mask=within, other=0).to(tl.int32) != 0, step, 0)
            decay = tl.exp2(step[None, :] * A)  # (N, I)
            span += step
            if sequence_starts is not None:
                begun = tl.load(sequence_starts + k, mask=within, other=0).to(tl.int32) != 0
                decay = tl.where(begun, 0, decay)
                span = tl.where(begun, float("inf"), span)
            xk = xs[k].to(tl.float32)
            hs = hs * decay + (step * xk)[None, :] * Bs[k].to(tl.float32)[:, None]
            if y is not None:
                out = tl.sum(hs * Cs[k].to(tl.float32)[:, None], axis=0) + skip * xk
                gate = zs[k].to(tl.float32)
                out = out * gate / (1 + tl.exp(-gate))
                if WHOLE:
                    tl.store(y + k * inner + i, out.to(y.dtype.element_ty))
                else:
                    tl.store(y + k * inner + i, out.to(y.dtype.element_ty), mask=mine & within)
        x += TOKENS * x_token
        dt += TOKENS * dt_token
        B += TOKENS * B_token
        if y is not None:
            C += TOKENS * C_token
            z += TOKENS * z_token
            y += TOKENS * inner
        if sequence_starts is not None:
            sequence_starts += TOKENS
        if real is not None:
            real += TOKENS
    if spans is not None:
        tl.store(begins + (row * chunks + c + 1) * inner * N + of_state, hs, mask=stored)
        tl.store(spans + (row * (chunks - 1) + c) * inner + i, span, mask=mine)
    if y is not None:
        tl.store(after + row * inner * N + of_state, hs, mask=stored & (c == chunks - 1))


@triton.jit
def _pass_on(
    A_log: tl.tensor,
    begins: tl.tensor,
    spans: tl.tensor,
    inner: tl.tensor,
    N: tl.tensor,
    chunks: tl.tensor,
    CHANNELS: tl.constexpr,
    STATE: tl.constexpr,
) -> None:
    """Turn final states from zero into first states: the chunk before's first state, decayed, plus its final one."""
    row = tl.program_id(1).to(tl.int64)
    i, n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATE)  # (I,), (N,)
    mine = i < inner
    stored = mine[None, :] & (n < N)[:, None]
    of_state = n[:, None] * inner + i[None, :]  # (N, I)
    A = tl.where(stored, -LOG2_E * exp(tl.load(A_log + of_state, mask=stored, other=0).to(tl.float32)), 0)
    begins += row * chunks * inner * N
    spans += row * (chunks - 1) * inner
    hs = tl.load(begins + of_state, mask=stored, other=0).to(tl.float32)
    for _ in range(chunks - 1):
        begins += inner * N
        span = tl.load(spans + i, mask=mine, other=0)
        # A sequence start within the chunk, marked by an infinite span, leaves nothing of the state.
        begun = span == float("inf")
        left = tl.where(begun[None, :], 0, tl.exp2(tl.where(begun, 0, span)[None, :] * A))
        hs = hs * left + tl.load(begins + of_state, mask=stored, other=0)
        tl.store(begins + of_state, hs, mask=stored)
        spans += inner
