"""IQ4_NL and IQ4_XS in Triton: a thread fits each group's scale; for IQ4_XS a second kernel packs blocks."""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import (
    block_lanes,
    floor_int,
    group_lanes,
    largest,
    like,
    load_row,
    load_rows,
    nearest_clipped,
    ratio,
    reciprocal,
    store_half,
    store_row,
    to_half,
)
from bamba_quant.codecs.cuda.k_offset import square_sum
from bamba_quant.codecs.cuda.launch import Blocks, encoder
from bamba_quant.codecs.cuda.search import GROUP_MAX_EPS, serial_sum, squares, weigh
from bamba_quant.codecs.iq4 import MIDPOINTS, TRIES, VALUES

_LOWEST: tl.constexpr = tl.constexpr(float(VALUES[0]))
_TRIES: tl.constexpr = tl.constexpr(TRIES)


def _table(blocks: Blocks) -> torch.Tensor:
    """The nearest value and its index for floor(2v) = -256 … 255; all midpoints are halves."""
    index = np.searchsorted(MIDPOINTS, np.arange(-256, 256) / 2, side="right")
    return torch.from_numpy(np.stack((VALUES[index], index)).astype(np.int8)).to(blocks.x.device)


@encoder("iq4_nl")
def _iq4_nl(blocks: Blocks) -> torch.Tensor:
    out = blocks.bytes(18)
    blocks.launch(
        _quantize_nl,
        blocks.x,
        blocks.weights,
        out,
        _table(blocks),
        blocks.per_row,
        WEIGHTED=blocks.importance is not None,
    )
    return out


@encoder("iq4_xs")
def _iq4_xs(blocks: Blocks) -> torch.Tensor:
    weighted = blocks.importance is not None
    sigma2, scales, out = blocks.floats(1), blocks.floats(8), blocks.bytes(136)
    if weighted:
        blocks.launch(square_sum, blocks.x, sigma2, FACTOR=2.0)
    blocks.launch(
        _search_xs,
        blocks.x,
        blocks.weights,
        sigma2,
        scales,
        _table(blocks),
        blocks.per_row,
        groups=8,
        WEIGHTED=weighted,
    )
    blocks.launch(_finish_xs, blocks.x, scales, out, _table(blocks))
    return out


@triton.jit
def _cell(v: tl.tensor) -> tl.tensor:
    """Where in the table v falls; the last cell for NaN."""
    return floor_int(tl.where(v == v, tl.minimum(tl.maximum(v * 2.0, -256.0), 255.0), 255.0)) + 256


@triton.jit
def _index(v: tl.tensor, table: tl.tensor) -> tl.tensor:
    return tl.load(table + 512 + _cell(v)).to(tl.int32)


@triton.jit
def _fit_scale(rows: tl.tuple, w: tl.tuple, table: tl.tensor) -> tl.tensor:
    greatest = largest(rows)
    d = like(greatest, 0.0)
    best = like(greatest, 0.0)
    for t in range(-_TRIES - 1, _TRIES + 1):
        start = t == -_TRIES - 1
        step = tl.div_rn(like(greatest, t + _LOWEST), greatest)
        first = tl.div_rn(like(greatest, 1.0), tl.div_rn(greatest * -1.0, like(greatest, _LOWEST)))
        inverse = tl.where(start, first, step)
        sumqx = like(greatest, 0.0)
        sumq2 = like(greatest, 0.0)
        for i in tl.static_range(32):
            q = tl.load(table + _cell(inverse * rows[i])).to(tl.float32)
            sumqx = sumqx + w[i] * q * rows[i]
            sumq2 = sumq2 + w[i] * q * q
        better = start | ((sumq2 > 0) & (sumqx * sumqx > best * sumq2))
        d = tl.where(better, ratio(sumqx, sumq2), d)
        best = tl.where(better, d * sumqx, best)
    return tl.where(tl.abs(greatest) < GROUP_MAX_EPS, 0.0, d)


@triton.jit
def _quantize_nl(
    x: tl.tensor,
    importance: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    lane = block_lanes(LANES)
    rows = load_rows(x, 0, n, lane, 32)
    if WEIGHTED:
        weight = load_rows(importance, 0, per_row, lane % per_row, 32)
        w = weigh(rows, weight, serial_sum(squares(rows)) * (2.0 / 32))
    else:
        w = squares(rows)
    d = _fit_scale(rows, w, table)
    store_half(out, 0, n, lane, to_half(d))
    inverse = reciprocal(d)
    for i in tl.static_range(16):
        byte = _index(inverse * rows[i], table) | (_index(inverse * rows[i + 16], table) << 4)
        store_row(out, 2 + i, n, lane, byte.to(tl.uint8))


@triton.jit
def _search_xs(
    x: tl.tensor,
    importance: tl.tensor,
    sigma2: tl.tensor,
    scales: tl.tensor,
    table: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    group, lane = group_lanes(n, 8, LANES)
    rows = load_rows(x, group * 32, n, lane, 32)
    if WEIGHTED:
        weight = load_rows(importance, group * 32, per_row, lane % per_row, 32)
        w = weigh(rows, weight, load_row(sigma2, 0, n, lane))
    else:
        w = squares(rows)
    store_row(scales, group, n, lane, _fit_scale(rows, w, table))


@triton.jit
def _finish_xs(
    x: tl.tensor, scales: tl.tensor, out: tl.tensor, table: tl.tensor, n: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    lane = block_lanes(LANES)
    fitted = load_rows(scales, 0, n, lane, 8)
    # Not a unary minus, which Triton takes from 0 and so loses the sign of a zero.
    d = largest(fitted) * (-1.0 / 32)
    inverse = reciprocal(d)
    store_half(out, 0, n, lane, to_half(d))
    codes = ()
    inverses = ()
    for g in tl.static_range(8):
        code = nearest_clipped(inverse * fitted[g], -32, 31)
        codes = codes + (code.to(tl.int32) + 32,)
        inverses = inverses + (reciprocal(d * code),)
    for k in tl.static_range(2):
        byte = codes[4 * k] >> 4
        for i in tl.static_range(1, 4):
            byte = byte | ((codes[4 * k + i] >> 4) << (2 * i))
        store_row(out, 2 + k, n, lane, byte.to(tl.uint8))
    for k in tl.static_range(4):
        byte = (codes[2 * k] & 15) | ((codes[2 * k + 1] & 15) << 4)
        store_row(out, 4 + k, n, lane, byte.to(tl.uint8))
    for i in range(16):
        for g in tl.static_range(8):
            low = _index(inverses[g] * load_row(x, 32 * g + i, n, lane), table)
            high = _index(inverses[g] * load_row(x, 32 * g + 16 + i, n, lane), table)
            byte = low | (high << 4)
            store_row(out, 8 + 16 * g + i, n, lane, byte.to(tl.uint8))
