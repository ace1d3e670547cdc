"""Mamba-2's recurrence with gradients: the forward scan of ``kernels.scan`` and its backward pass in Triton.

Nothing of the forward pass is kept but its inputs. Going back, one kernel walks forward through the chunks and writes
the state before each, another walks backward and writes the gradient of the state behind each (both are ``walk``);
then all chunks are independent. With a_i the log of the decay up to token i of a chunk, M_ij = C_i·B_j exp(a_i - a_j)
dt_j, h the state before the chunk and g the gradient of the state behind it:

    dx_j = Σ_i M_ij dy_i + keep_j g B_j + D dy_j
    dC_i = Σ_j dy_i·x_j exp(a_i - a_j) dt_j B_j + reach_i hᵀ dy_i, dB_j likewise with keep_j gᵀ x_j

The gradient of one step's dt·A sums what passes over that step, of positive and negative terms as they are: differences
of sums over rows and columns would cancel (mamba_ssm, ssd_chunk_scan.py, has the same remark).

All sums have a fixed order, so that the same inputs have the same gradients.
"""
# Triton's own meaning of this syntax: tuples grow by adding.
# mypy: disable-error-code="untyped-decorator, assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels import scan as forward_scan
from bamba_reference.kernels.backward.walk import COLUMNS, ROWS, states
from bamba_reference.kernels.chunks import decays, pairs
from bamba_reference.kernels.launch import INTERPRETED, padded, rows_apart
from bamba_reference.kernels.scan import add_dot
from bamba_reference.torch.scan import ScanArguments

_CHUNK = 64  # tokens
# So many programs keep a GPU busy; a program adds up the gradients of B and C over its heads.
_PROGRAMS = 1024


def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """``torch.scan.scan``, differentiable in everything that is a float tensor."""
    x, dt, A_log, B, C, D, dt_bias, limit, h, chunk, sequence_starts, real = arguments
    found: tuple[Tensor, Tensor] = _Scan.apply(
        x, dt, A_log, B, C, D, dt_bias, h, limit, chunk, sequence_starts, real
    )
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
                h: Tensor, limit: tuple[float, float], chunk: int, sequence_starts: Tensor | None,
                real: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(x, dt, A_log, B, C, D, dt_bias, h, sequence_starts, real)
        ctx.limit = limit
        return forward_scan.scan(
            ScanArguments(x, dt, A_log, B, C, D, dt_bias, limit, h, chunk, sequence_starts, real)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A_log, B, C, D, dt_bias, h, sequence_starts, real = ctx.saved_tensors
        found = _backward(
            ScanArguments(x, dt, A_log, B, C, D, dt_bias, ctx.limit, h, 0, sequence_starts, real), *gradients
        )
        return (*found, None, None, None, None)


def _backward(arguments: ScanArguments, dy: Tensor, end: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A_log, B, C, D, dt_bias and h, from those of y (B, L, H, P) and of the last state."""
    x, dt, A_log, B, C, D, dt_bias, limit, h, _, sequence_starts, real = arguments
    x, B, C, dy = (rows_apart(v) for v in (x, B, C, dy))
    rows, L, H, P = x.shape
    G, N = B.shape[2:]
    # With eight warps Triton 3.6 makes wrong code of float16's products; float32's take longer and are right.
    wide = x.dtype != torch.bfloat16 or INTERPRETED
    Q = padded(L, most=_CHUNK if N <= 128 and not wide else _CHUNK // 2)
    chunks = -(-L // Q)
    segment = None if sequence_starts is None else sequence_starts.cumsum(1, dtype=torch.int32)  # (B, L)
    decay = decays(dt, A_log, dt_bias, limit, real, Q)
    before, _ = states(x, B, decay.keeps, decay, segment, h.contiguous(), Q, wide, reverse=False)
    behind, dh = states(dy, C, decay.reaches, decay, segment, end.float().contiguous(), Q, wide, reverse=True)

    heads = H // G
    splits = min(heads, max(1, _PROGRAMS // (rows * chunks * G)))
    each = -(-heads // splits)
    splits = -(-heads // each)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt, ddtA = torch.empty(2, rows, H, chunks * Q, dtype=torch.float32, device=x.device)
    dD = torch.empty(rows, chunks, H, dtype=torch.float32, device=x.device)
    dB, dC = torch.empty(2, splits, rows, L, G, N, dtype=torch.float32, device=x.device)
    state = padded(N)
    columns = min(COLUMNS, state)
    _gradients[(chunks, G * splits, rows)](
        x, dy, B, C,
        decay.steps, decay.sums, decay.reaches,
        pairs(B, C, segment, Q, state, wide),
        D, before, behind, segment,
        dx, ddt, ddtA, dD, dB, dC,
        L, H, P, N, G, heads, each,
        *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3],
        Q=Q, ROWS=padded(P, most=ROWS), BLOCKS=-(-P // padded(P, most=ROWS)),
        COLUMNS=columns, PARTS=state // columns, WIDE=wide, num_warps=8, num_stages=1,
    )  # fmt: skip
    ddt, ddtA = (v[..., :L].transpose(1, 2) for v in (ddt, ddtA))  # (B, L, H)
    A = -A_log.float().exp()
    raw = dt.float() + dt_bias.float()
    step = F.softplus(raw)
    passes = (step >= limit[0]) & (step <= limit[1])
    if real is not None:  # padding has dt 0
        ddt, ddtA = ddt * real[..., None], ddtA * real[..., None]
    dA_log = (ddtA * step.clamp(*limit)).sum((0, 1)) * A
    draw = torch.where(passes, (ddt + ddtA * A) * raw.sigmoid(), 0)
    return (
        dx,
        draw.to(dt.dtype),
        dA_log.to(A_log.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        dD.sum((0, 1)).to(D.dtype),
        draw.sum((0, 1)).to(dt_bias.dtype),
        dh.to(h.dtype),
    )


@triton.jit
def _gradients(
    x: tl.tensor,
    dy: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    steps: tl.tensor,
    sums: tl.tensor,
    reaches: tl.tensor,
    pairs: tl.tensor,
    D: tl.tensor,
    before: tl.tensor,
    behind: tl.tensor,
    segment: tl.tensor,
    dx: tl.tensor,
    ddt: tl.tensor,
    ddtA: tl.tensor,
    dD: tl.tensor,
    dB: tl.tensor,
    dC: tl.tensor,
    L: tl.tensor,
    H: tl.tensor,
    P: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    heads_a_group: tl.tensor,
    heads_a_program: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    dy_row: tl.tensor,
    dy_token: tl.tensor,
    dy_head: tl.tensor,
    B_row: tl.tensor,
    B_token: tl.tensor,
    B_group: tl.tensor,
    C_row: tl.tensor,
    C_token: tl.tensor,
    C_group: tl.tensor,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    chunk, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group, split = tl.program_id(1) % G, tl.program_id(1) // G
    chunks, rows = tl.num_programs(0), tl.num_programs(2)
    i, n, r = tl.arange(0, Q), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    t = chunk * Q + i  # (q,)
    B += row * B_row + group * B_group + t[:, None] * B_token + n[None, :]
    C += row * C_row + group * C_group + t[:, None] * C_token + n[None, :]
    CB = tl.load(pairs + ((row * chunks + chunk) * G + group) * Q * Q + i[:, None] * Q + i[None, :])  # (j, i)
    visible = i[:, None] <= i[None, :]  # token j, the row, from token i, the column
    from_before, to_behind, goes_on = t >= 0, t >= 0, 1
    if segment is not None:
        of_row = segment + row * L
        mine = tl.load(of_row + t, mask=t < L, other=-1)
        first = tl.load(of_row + chunk * Q - 1, mask=chunk > 0, other=0)
        end = tl.load(of_row + tl.minimum(chunk * Q + Q, L) - 1)
        visible = visible & (mine[:, None] == mine[None, :])
        from_before, to_behind = mine == first, mine == end
        goes_on = tl.where(first == end, 1, 0)
    dCB = tl.zeros((Q, Q), tl.float32)  # (j, i), of all heads
    dBs, dCs = (), ()
    for _ in tl.static_range(PARTS):
        dBs, dCs = dBs + (tl.zeros((Q, COLUMNS), tl.float32),), dCs + (tl.zeros((Q, COLUMNS), tl.float32),)
    first_head = group * heads_a_group + split * heads_a_program
    for head in range(first_head, tl.minimum(first_head + heads_a_program, (group + 1) * heads_a_group)):
        at = (row * H + head) * chunks + chunk
        step, a = tl.load(steps + at * Q + i), tl.load(sums + at * Q + i)  # (q,)
        reach = tl.where(from_before, tl.load(reaches + at * Q + i), 0)
        decay = tl.load(reaches + at * Q + Q - 1) * goes_on
        left = tl.where(to_behind, tl.exp2(tl.load(sums + at * Q + Q - 1) - a), 0)  # keep_j / dt_j
        W = tl.where(visible, tl.exp2(tl.minimum(a[None, :] - a[:, None], 0)), 0)  # (j, i)
        M = CB * W * step[:, None]
        skip = tl.load(D + head).to(tl.float32)
        M = tl.where(i[:, None] == i[None, :], M + skip, M)  # y = … + D x
        dM = tl.zeros((Q, Q), tl.float32)
        into, out = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)  # x_j·g B_j; dy_i·h C_i
        inner = 0.0  # h·g
        for block in tl.static_range(BLOCKS):
            p = block * ROWS + r  # (P,)
            of_head = (t < L)[:, None] & (p < P)[None, :]
            xs = tl.load(
                x + row * x_row + head * x_head + t[:, None] * x_token + p[None, :], of_head, other=0
            )
            dys = tl.load(
                dy + row * dy_row + head * dy_head + t[:, None] * dy_token + p[None, :], of_head, other=0
            )
            dM = add_dot(xs, tl.trans(dys), dM, WIDE)  # (j, i)
            dxs = add_dot(M, dys, tl.zeros((Q, ROWS), tl.float32), WIDE)  # (j, P)
            back = tl.zeros((Q, ROWS), tl.float32)
            parts_B, parts_C = (), ()
            for k in tl.static_range(PARTS):
                c = k * COLUMNS + n  # (N,)
                of_group = (t < L)[:, None] & (c < N)[None, :]
                Bs = tl.load(B + k * COLUMNS, mask=of_group, other=0)  # (q, N)
                Cs = tl.load(C + k * COLUMNS, mask=of_group, other=0)
                of_state = at * P * N + p[:, None] * N + c[None, :]
                stored = (p < P)[:, None] & (c < N)[None, :]
                h = tl.load(before + of_state, mask=stored, other=0)  # (P, N)
                g = tl.load(behind + of_state, mask=stored, other=0)
                inner += tl.sum(h * g)
                xg = add_dot(xs, g, tl.zeros((Q, COLUMNS), tl.float32), WIDE)  # (j, N)
                yh = add_dot(dys, h, tl.zeros((Q, COLUMNS), tl.float32), WIDE)  # (i, N)
                into += tl.sum(Bs.to(tl.float32) * xg, 1)
                out += tl.sum(Cs.to(tl.float32) * yh, 1)
                back = add_dot(Bs, tl.trans(g), back, WIDE)  # (j, P)
                parts_B = parts_B + (dBs[k] + xg * (left * step)[:, None],)
                parts_C = parts_C + (dCs[k] + yh * reach[:, None],)
            dBs, dCs = parts_B, parts_C
            dxs += back * (left * step)[:, None]
            target = dx + ((row * L + t[:, None]) * H + head) * P + p[None, :]
            tl.store(target, dxs.to(dx.dtype.element_ty), mask=of_head)
        of_pairs = dM * W
        dCB += of_pairs * step[:, None]
        E = of_pairs * CB  # without dt_j
        # Over token k passes what token j < k gives to token i >= k.
        passed = E * step[:, None]
        earlier = tl.cumsum(passed, 0) - passed  # (k, i)
        over = tl.sum(tl.where(i[:, None] <= i[None, :], earlier, 0), 1)  # (k,)
        over += tl.cumsum(out * reach, 0, reverse=True) + inner * decay
        kept = into * left * step
        over += tl.cumsum(kept, 0) - kept
        tl.store(ddtA + at * Q + i, over)
        tl.store(ddt + at * Q + i, tl.sum(E, 1) + into * left)
        tl.store(dD + (row * chunks + chunk) * H + head, tl.sum(tl.where(i[:, None] == i[None, :], dM, 0)))
    target = (((split * rows + row) * L + t[:, None]) * G + group) * N + n[None, :]
    for k in tl.static_range(PARTS):
        of_group = (t < L)[:, None] & (k * COLUMNS + n < N)[None, :]
        Bs = tl.load(B + k * COLUMNS, mask=of_group, other=0)
        Cs = tl.load(C + k * COLUMNS, mask=of_group, other=0)
        tl.store(dB + target + k * COLUMNS, add_dot(dCB, Cs, dBs[k], WIDE), mask=of_group)
        tl.store(dC + target + k * COLUMNS, add_dot(tl.trans(dCB), Bs, dCs[k], WIDE), mask=of_group)
