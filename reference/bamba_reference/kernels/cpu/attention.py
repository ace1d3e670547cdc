"""Causal attention, a tile of queries at a time, whose scores against all keys stay in a core's cache.

Scores are stored transposed, (keys, queries): each lane of a vector is one query, so that a softmax needs no sum across
lanes, and the second product reads the numbers for the rows of its tiles in order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import exp
from bamba_reference.kernels.cpu.launch import (
    FLOAT,
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
from bamba_reference.kernels.cpu.matmul import TERMS
from bamba_reference.kernels.cpu.tiles import LANES, ROWS, WIDTH, multiply_1, multiply_2, multiply_3
from bamba_reference.torch import ops as torch_ops

# With fewer queries too much of a tile is unused.
LEAST_QUERIES = 16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    padding: Tensor | None,
    sequences: list[tuple[int, int, int]] | None,
) -> Tensor:
    """``torch.ops.attention``: q (B, L, heads, E) over k and v (B, S, kv, E): (B, L, heads, E)."""
    (B, L, heads, E), (S, kv) = q.shape, k.shape[1:3]
    fits = k.shape == v.shape == (B, S, kv, E) and S >= L and heads % kv == 0
    if L < LEAST_QUERIES or not fits or not supported(q, k, v):
        return torch_ops.attention(q, k, v, scale, padding, sequences)
    q, k, v = (t if t.stride(3) == 1 and t.stride(2) == E else t.contiguous() for t in (q, k, v))
    out = empty(B, L, heads, E)
    share(
        _attention_of_heads,
        memory(q), *q.stride()[:2], memory(k), *k.stride()[:2], memory(v), *v.stride()[:2], memory(out),
        _first_seen(B, L, S, padding, sequences).flatten().numpy(), L, S, heads, kv, E, np.float32(scale),
        count=B * heads,
    )  # fmt: skip
    return out


def _first_seen(
    B: int, L: int, S: int, padding: Tensor | None, sequences: list[tuple[int, int, int]] | None
) -> Tensor:
    """The first key that each query sees, itself being the last: (B, L)."""
    first = torch.zeros(B, L, dtype=torch.int64)
    for row, start, stop in sequences or ():
        first[row, start:stop] = start
    if padding is not None:
        first = torch.minimum(padding[:, None], torch.arange(S - L, S))
    return first


@compiled(
    FLOATS, SIZE, SIZE, FLOATS, SIZE, SIZE, FLOATS, SIZE, SIZE, FLOATS, SIZES,
    SIZE, SIZE, SIZE, SIZE, SIZE, FLOAT, SIZE, SIZE,
)  # fmt: skip
def _attention_of_heads(
    q: Floats, q_row: int, q_step: int, k: Floats, k_row: int, k_step: int, v: Floats, v_row: int, v_step: int,
    out: Floats, first: Integers, L: int, S: int, heads: int, kv: int, E: int, scale: float, start: int, stop: int,
) -> None:  # fmt: skip
    """Heads start … stop of all rows' heads."""
    Ss, Es = (S + ROWS - 1) // ROWS * ROWS, (E + LANES - 1) // LANES * LANES
    KT, V = np.zeros(E * Ss, np.float32), np.zeros(S * Es, np.float32)
    QT, scores = np.zeros(E * WIDTH, np.float32), np.empty(Ss * WIDTH, np.float32)
    sums, part, largest = (
        np.empty(WIDTH, np.float32),
        np.empty(WIDTH, np.float32),
        np.empty(WIDTH, np.float32),
    )
    y = np.empty(WIDTH * Es, np.float32)
    held = -1
    for number in range(start, stop):
        b, head = number // heads, number % heads
        source = b * kv + head // (heads // kv)
        if source != held:
            held = source
            for j in range(S):
                key = k[b * k_row + j * k_step + source % kv * E :][:E]
                value, row = v[b * v_row + j * v_step + source % kv * E :][:E], V[j * Es : j * Es + E]
                for e in range(E):
                    KT[e * Ss + j] = key[e]
                    row[e] = value[e]
        for i0 in range(0, L, WIDTH):
            queries, position = min(WIDTH, L - i0), S - L + i0  # position: the position of the first query
            low = first[b * L + i0]
            for i in range(queries):
                low = min(low, first[b * L + i0 + i])
                query = q[b * q_row + (i0 + i) * q_step + head * E :][:E]
                for e in range(E):
                    QT[e * WIDTH + i] = query[e] * scale
            low, seen = low // ROWS * ROWS, position + queries
            for j in range(low, seen, ROWS):
                multiply_3(KT, j, Ss, QT, 0, WIDTH, scores, j * WIDTH, WIDTH, E, np.float32(0))
            _mask(scores, first, b * L + i0, position, low, seen, queries)
            _softmax(scores, largest, sums, part, low, seen)
            for j in range(low, seen, TERMS):
                some, kept = min(TERMS, seen - j), np.float32(0 if j == low else 1)
                for i in range(0, queries, ROWS):
                    for e in range(0, Es // (2 * LANES) * 2 * LANES, 2 * LANES):
                        multiply_2(
                            scores, j * WIDTH + i, WIDTH, V, j * Es + e, Es, y, i * Es + e, Es, some, kept
                        )
                    if Es % (2 * LANES):
                        e = Es - LANES
                        multiply_1(
                            scores, j * WIDTH + i, WIDTH, V, j * Es + e, Es, y, i * Es + e, Es, some, kept
                        )
            for i in range(queries):
                target, row = out[((b * L + i0 + i) * heads + head) * E :][:E], y[i * Es : i * Es + E]
                for e in range(E):
                    target[e] = row[e] / sums[i]


@inlined
def _mask(scores: Floats, first: Integers, at: int, position: int, low: int, seen: int, queries: int) -> None:
    """Minus infinity where query i, at position position + i, does not see a key."""
    for i in range(queries):
        for j in range(low, first[at + i]):
            scores[j * WIDTH + i] = -np.float32(np.inf)
        for j in range(position + i + 1, seen):
            scores[j * WIDTH + i] = -np.float32(np.inf)


@inlined
def _softmax(scores: Floats, largest: Floats, sums: Floats, part: Floats, low: int, seen: int) -> None:
    """Each query's scores (columns) to exp of their distance from the largest, and the sums of these."""
    largest[:] = scores[low * WIDTH : (low + 1) * WIDTH]
    for j in range(low + 1, seen):
        row = scores[j * WIDTH : (j + 1) * WIDTH]
        for i in range(WIDTH):
            largest[i] = row[i] if row[i] > largest[i] else largest[i]
    sums[:] = np.float32(0)
    for j0 in range(low, seen, TERMS):
        part[:] = np.float32(0)
        for j in range(j0, min(seen, j0 + TERMS)):
            row = scores[j * WIDTH : (j + 1) * WIDTH]
            for i in range(WIDTH):
                row[i] = exp(row[i] - largest[i])
                part[i] += row[i]
        for i in range(WIDTH):
            sums[i] += part[i]
