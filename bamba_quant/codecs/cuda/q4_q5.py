"""Q4_0, Q4_1, Q5_0 and Q5_1 in Triton: a thread quantizes each block of 32."""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import (
    block_lanes,
    largest,
    like,
    load_rows,
    nearest_clipped,
    reciprocal,
    store_half,
    store_row,
    to_half,
    truncate,
)
from bamba_quant.codecs.cuda.launch import Blocks, encoder, launch
from bamba_quant.codecs.cuda.search import fit_qkx, fit_qx, weigh
from bamba_quant.codecs.q4_q5 import offset_grid
from bamba_quant.codecs.search import spans_around


@encoder("q4_0")
def _q4_0(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, 4, False)


@encoder("q5_0")
def _q5_0(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, 5, False)


@encoder("q4_1")
def _q4_1(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, 4, True)


@encoder("q5_1")
def _q5_1(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, 5, True)


def _encode(blocks: Blocks, bits: int, offset: bool) -> torch.Tensor:
    rows, columns = blocks.rows.shape
    nmax = (1 << bits) - 1 if offset else 1 << (bits - 1)
    spans = offset_grid(bits).spans if offset else spans_around(nmax, 9)
    out = blocks.bytes(4 * bits + (4 if offset else 2))
    sigma2 = torch.empty(rows, dtype=torch.float32, device=blocks.x.device)
    weighted = blocks.importance is not None
    if weighted:
        launch(_mean_squares, rows, blocks.x.device, blocks.rows.contiguous(), sigma2, columns)
    blocks.launch(
        _quantize,
        blocks.x,
        blocks.weights,
        sigma2,
        out,
        blocks.constants(nmax, spans),
        len(spans) + 1,
        blocks.per_row,
        BITS=bits,
        OFFSET=offset,
        WEIGHTED=weighted,
    )
    return out


@triton.jit
def _mean_squares(
    rows: tl.tensor, sigma2: tl.tensor, columns: tl.tensor, n: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    """The mean square of each of n rows, summed serially."""
    row = block_lanes(LANES)
    total = tl.full((LANES,), 0.0, tl.float32)
    for first in range(0, columns, 16):
        for i in tl.static_range(16):
            value = tl.load(rows + row * columns + first + i, mask=row < n, other=0)
            total = total + value * value
    store_row(sigma2, 0, n, row, tl.div_rn(total, like(total, 1.0) * columns))


@triton.jit
def _quantize(
    x: tl.tensor,
    importance: tl.tensor,
    sigma2: tl.tensor,
    out: tl.tensor,
    spans: tl.tensor,
    n_spans: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    lane = block_lanes(LANES)
    rows = load_rows(x, 0, n, lane, 32)
    w = rows
    if WEIGHTED:
        weight = load_rows(importance, 0, per_row, lane % per_row, 32)
        w = weigh(rows, weight, tl.load(sigma2 + lane // per_row, mask=lane < n, other=0))
    if OFFSET:
        d, m, integers = _offset(rows, w, spans, n_spans, (1 << BITS) - 1, WEIGHTED)
        store_half(out, 2, n, lane, to_half(m))
    else:
        d, integers = _signed(rows, w, spans, 1 << (BITS - 1), WEIGHTED)
    store_half(out, 0, n, lane, to_half(d))
    at = 4 if OFFSET else 2
    if BITS == 5:
        for k in tl.static_range(4):
            byte = tl.full((LANES,), 0, tl.int32)
            for i in tl.static_range(8):
                byte = byte | (((integers[8 * k + i] >> 4) & 1) << i)
            store_row(out, at + k, n, lane, byte.to(tl.uint8))
        at += 4
    for i in tl.static_range(16):
        byte = (integers[i] & 15) | ((integers[i + 16] & 15) << 4)
        store_row(out, at + i, n, lane, byte.to(tl.uint8))


@triton.jit
def _as_byte(q: tl.tensor, GREATEST: tl.constexpr) -> tl.tensor:
    """What is left of an integer as an int8, at most ``GREATEST``, in a uint8."""
    return tl.minimum((q << 24) >> 24, GREATEST) & 255


@triton.jit
def _signed(
    rows: tl.tuple, w: tl.tuple, spans: tl.tensor, NMAX: tl.constexpr, WEIGHTED: tl.constexpr
) -> tl.tuple:
    integers = ()
    if WEIGHTED:
        d, inverse, tiny = fit_qx(rows, w, spans, NMAX)
        for i in tl.static_range(32):
            q = nearest_clipped(inverse * rows[i], -NMAX, NMAX - 1).to(tl.int32) + NMAX
            integers = integers + (tl.where(tiny, 0, q),)
    else:
        d = largest(rows) * (-1.0 / NMAX)
        inverse = reciprocal(d)
        for i in tl.static_range(32):
            q = truncate(rows[i] * inverse + (NMAX + 0.5))
            integers = integers + (_as_byte(q, 2 * NMAX - 1),)
    return d, integers


@triton.jit
def _offset(
    rows: tl.tuple,
    w: tl.tuple,
    spans: tl.tensor,
    n_spans: tl.tensor,
    NMAX: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> tl.tuple:
    integers = ()
    if WEIGHTED:
        d, m, inverse, origin = fit_qkx(rows, w, spans, n_spans, NMAX, False)
        for i in tl.static_range(32):
            integers = integers + (nearest_clipped(inverse * (rows[i] - origin), 0, NMAX).to(tl.int32),)
    else:
        m = rows[0]
        high = rows[0]
        for i in tl.static_range(1, 32):
            m = tl.where(rows[i] < m, rows[i], m)
            high = tl.where(rows[i] > high, rows[i], high)
        d = tl.div_rn(high - m, like(m, NMAX))
        inverse = reciprocal(d)
        for i in tl.static_range(32):
            integers = integers + (_as_byte(truncate((rows[i] - m) * inverse + 0.5), NMAX),)
    return d, m, integers
