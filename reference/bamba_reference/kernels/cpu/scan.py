"""Mamba-2's scan, chunk by chunk so that a chunk's data stay in a core's cache; threads divide the heads.

The formulas are those of ``torch.scan.scan``. The left operands of ``tiles.multiply`` are stored transposed, so that
the numbers for the rows of a tile are neighbours; a transposed matrix has T in its name. P is padded with zeros to
whole vectors, N and a chunk's tokens to whole tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import exp
from bamba_reference.kernels.cpu.launch import (
    FLOATS,
    SIZE,
    SIZES,
    Floats,
    Integers,
    compiled,
    empty,
    inlined,
    memory,
    share,
    supported,
)
from bamba_reference.kernels.cpu.tiles import LANES, ROWS, multiply_1, multiply_2
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.scan import ScanArguments

_STEP = max(LANES, ROWS)

# With fewer tokens, transposing the states costs more than it saves.
LEAST_TOKENS = 16


def scan(
    arguments: ScanArguments,
) -> tuple[Tensor, Tensor]:
    """``torch.scan.scan``: y (B, L, H, P) and the state (B, H, P, N) after the last token."""
    x, dt, A_log, B, C, D, dt_bias, dt_limit, h, chunk, sequence_starts, real = arguments
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    fits = (
        L >= LEAST_TOKENS
        and dt.shape == (rows, L, H)
        and B.shape == C.shape == (rows, L, G, N)
        and H % G == 0
        and h.shape == (rows, H, P, N)
        and A_log.shape == D.shape == dt_bias.shape == (H,)
    )
    if not fits or not supported(x, dt, A_log, B, C, D, dt_bias, h):
        return torch_scan.scan(arguments)
    dt = F.softplus(dt.contiguous() + dt_bias).clamp(*dt_limit)  # (B, L, H)
    if real is not None:
        dt = dt * real[..., None]
    dtA = dt * -torch.exp(A_log)  # (B, L, H)
    x, B, C = (v if v.stride(3) == 1 and v.stride(2) == v.shape[3] else v.contiguous() for v in (x, B, C))
    segments = (
        torch.zeros(rows, L, dtype=torch.int64) if sequence_starts is None else sequence_starts.cumsum(1)
    )
    y, h = empty(rows, L, H, P), h.clone(memory_format=torch.contiguous_format)
    share(
        _scan,
        memory(x), *x.stride()[:2], memory(B), *B.stride()[:2], memory(C), *C.stride()[:2],
        memory(dt), memory(dtA), memory(D.contiguous()), segments.flatten().numpy(), memory(h), memory(y),
        L, H, P, G, N, min(chunk, L),
        count=rows * H,
    )  # fmt: skip
    return y, h


@inlined
def _zeros(n: int) -> Floats:
    return np.zeros(n, np.float32)


@inlined
def _padded(n: int) -> int:
    return (n + _STEP - 1) // _STEP * _STEP


@inlined
def _multiply(
    a: Floats,
    a0: int,
    a_step: int,
    b: Floats,
    b_step: int,
    c: Floats,
    c0: int,
    width: int,
    terms: int,
    kept: Any,
) -> None:
    """ROWS rows of c (…, width) = kept c + a b, for a of ``terms`` columns that lie a_step apart."""
    whole = width // (2 * LANES) * (2 * LANES)
    for v in range(0, whole, 2 * LANES):
        multiply_2(a, a0, a_step, b, v, b_step, c, c0 + v, width, terms, kept)
    if whole < width:
        multiply_1(a, a0, a_step, b, whole, b_step, c, c0 + whole, width, terms, kept)


@compiled(
    FLOATS, SIZE, SIZE, FLOATS, SIZE, SIZE, FLOATS, SIZE, SIZE, FLOATS, FLOATS, FLOATS, SIZES, FLOATS, FLOATS,
    SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE,
)  # fmt: skip
def _scan(
    x: Floats, x_row: int, x_step: int, B: Floats, B_row: int, B_step: int, C: Floats, C_row: int, C_step: int,
    dt: Floats, dtA: Floats, D: Floats, segments: Integers, h: Floats, y: Floats,
    L: int, H: int, P: int, G: int, N: int, q: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Heads start … stop of all rows' heads; h (rows, H, P, N) becomes the state after the last token."""
    qs, Ps, Ns = _padded(q), _padded(P), _padded(N)
    # The states transposed, and of one chunk: B and C, B Cᵀ, the matrix M, x, x times the decay to its end, and y.
    hT = _zeros((stop - start) * Ns * Ps)
    Bs, Cs, BT, CT = _zeros(qs * Ns), _zeros(qs * Ns), _zeros(qs * Ns), _zeros(qs * Ns)
    BCT, MT = _zeros(qs * qs), _zeros(qs * qs)
    xs, kept, ys = _zeros(qs * Ps), _zeros(qs * Ps), _zeros(qs * Ps)
    a, reach, keep, step = np.zeros(qs), _zeros(qs), _zeros(qs), _zeros(qs)
    for i in range(stop - start):
        for p in range(P):
            for n in range(N):
                hT[(i * Ns + n) * Ps + p] = h[((start + i) * P + p) * N + n]
    for first in range(start // H * H, stop, H):  # the heads of one row of the batch
        b = first // H
        for t0 in range(0, L, q):
            now = min(q, L - t0)
            segment = segments[b * L + t0 : b * L + t0 + now]
            before = segments[b * L + t0 - 1] if t0 else 0
            group = -1
            for head in range(max(start, first), min(stop, first + H)):
                at, own = head - first, hT[(head - start) * Ns * Ps : (head - start + 1) * Ns * Ps]
                if at // (H // G) != group:
                    group = at // (H // G)
                    _group(B, b * B_row + t0 * B_step + group * N, B_step, now, qs, N, Ns, Bs, BT)
                    _group(C, b * C_row + t0 * C_step + group * N, C_step, now, qs, N, Ns, Cs, CT)
                    for j in range(0, qs, ROWS):
                        _multiply(BT, j, qs, CT, qs, BCT, j * qs, qs, N, np.float32(0))
                token = b * L + t0
                _decays(dt, dtA, token * H + at, H, segment, before, a, step, reach, keep)
                _ssd_matrix_transposed(a, step, segment, BCT, D[at], qs, MT)
                _inputs(x, b * x_row + t0 * x_step + at * P, x_step, P, Ps, keep, now, xs, kept)
                for i in range(0, now, ROWS):
                    _multiply(CT, i, qs, own, Ps, ys, i * Ps, Ps, N, np.float32(0))
                    for r in range(i, i + ROWS):
                        row = ys[r * Ps : (r + 1) * Ps]
                        for p in range(Ps):
                            row[p] *= reach[r]
                    _multiply(MT, i, qs, xs, Ps, ys, i * Ps, Ps, min(i + ROWS, now), np.float32(1))
                for i in range(now):
                    place = ((token + i) * H + at) * P
                    target, row = y[place : place + P], ys[i * Ps : i * Ps + P]
                    for p in range(P):
                        target[p] = row[p]
                for n in range(0, N, ROWS):
                    _multiply(Bs, n, Ns, kept, Ps, own, n * Ps, Ps, now, reach[now - 1])
    for i in range(stop - start):
        for p in range(P):
            for n in range(N):
                h[((start + i) * P + p) * N + n] = hT[(i * Ns + n) * Ps + p]


@inlined
def _decays(
    dt: Floats, dtA: Floats, first: int, apart: int, segment: Integers, before: int,
    a: Any, step: Floats, reach: Floats, keep: Floats,
) -> None:  # fmt: skip
    """Of a chunk's tokens: the sums a of dt A, dt, and the decays of the state into each, of each into the state."""
    now, total = len(segment), 0.0
    for i in range(now):
        total += np.float64(dtA[first + i * apart])
        a[i], step[i] = total, dt[first + i * apart]
    for i in range(now):
        reach[i] = exp(np.float32(a[i])) if segment[i] == before else np.float32(0)
        last = segment[i] == segment[now - 1]
        keep[i] = exp(np.float32(total - a[i])) * step[i] if last else np.float32(0)


@inlined
def _ssd_matrix_transposed(
    a: Any, step: Floats, segment: Integers, BCT: Floats, D: Any, qs: int, MT: Floats
) -> None:
    """M transposed, (qs, qs): what the input of token j adds to the output of token i >= j, D x among it."""
    now = len(segment)
    for j in range(qs):
        row = MT[j * qs : (j + 1) * qs]
        for i in range(qs):
            row[i] = np.float32(a[i] - a[j]) if i >= j else -np.float32(np.inf)
    for i in range(qs * qs):
        MT[i] = exp(MT[i]) * BCT[i]
    for j in range(now):
        row = MT[j * qs : (j + 1) * qs]
        for i in range(qs):
            row[i] *= step[j]
        if segment[now - 1] != segment[j]:
            for i in range(j, now):
                row[i] = row[i] if segment[i] == segment[j] else np.float32(0)
        row[j] += D


@inlined
def _inputs(
    x: Floats, first: int, apart: int, P: int, Ps: int, keep: Floats, now: int, xs: Floats, kept: Floats
) -> None:
    """One head's x, and x times the decay to the chunk's end: (now, Ps) both."""
    for i in range(now):
        source = x[first + i * apart : first + i * apart + P]
        row, weighted = xs[i * Ps : i * Ps + P], kept[i * Ps : i * Ps + P]
        for p in range(P):
            row[p] = source[p]
            weighted[p] = source[p] * keep[i]


@inlined
def _group(
    v: Floats, v0: int, step: int, q: int, qs: int, N: int, Ns: int, out: Floats, transposed: Floats
) -> None:
    """B or C of one group and chunk: out (qs, Ns) and transposed (Ns, qs)."""
    for i in range(q):
        row, source = out[i * Ns : i * Ns + N], v[v0 + i * step : v0 + i * step + N]
        for n in range(N):
            row[n] = source[n]
    for n in range(N):
        row = transposed[n * qs : n * qs + q]
        for i in range(q):
            row[i] = out[i * Ns + n]
