"""Q3_K and Q6_K in Triton: one kernel searches each group, a second codes the scales and packs each block."""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005, SIM108

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import (
    block_lanes,
    from_half,
    group_lanes,
    largest,
    like,
    load_row,
    load_rows,
    nearest_clipped,
    nearest_int,
    store_half,
    store_row,
    to_half,
)
from bamba_quant.codecs.cuda.k_offset import square_sum
from bamba_quant.codecs.cuda.launch import Blocks, encoder
from bamba_quant.codecs.cuda.search import GROUP_MAX_EPS, fit_q3, fit_qx, serial_sum, squares, weigh
from bamba_quant.codecs.search import spans_around

_GROUPS = 16


@encoder("q3_k")
def _q3_k(blocks: Blocks) -> torch.Tensor:
    weighted = blocks.importance is not None
    sigma2, fits, L, out = blocks.floats(1), blocks.floats(2, _GROUPS), blocks.bytes(256), blocks.bytes(110)
    if weighted:
        blocks.launch(square_sum, blocks.x, sigma2, FACTOR=2.0)
    blocks.launch(
        _search_q3,
        blocks.x,
        blocks.weights,
        sigma2,
        fits,
        L,
        blocks.constants(4, spans_around(4, 9)),
        blocks.per_row,
        groups=_GROUPS,
        WEIGHTED=weighted,
    )
    blocks.launch(
        _finish_q3, blocks.x, fits, L, out, blocks.constants(32, spans_around(32, 9)), WEIGHTED=weighted
    )
    return out


@encoder("q6_k")
def _q6_k(blocks: Blocks) -> torch.Tensor:
    fits, L, out = blocks.floats(_GROUPS), blocks.bytes(256), blocks.bytes(210)
    blocks.launch(
        _search_q6,
        blocks.x,
        blocks.weights,
        fits,
        L,
        blocks.constants(32, spans_around(32, 9)),
        blocks.per_row,
        groups=_GROUPS,
        WEIGHTED=blocks.importance is not None,
    )
    blocks.launch(_finish_q6, blocks.x, fits, L, out)
    return out


@triton.jit
def _search_q3(
    x: tl.tensor,
    importance: tl.tensor,
    sigma2: tl.tensor,
    fits: tl.tensor,
    L: tl.tensor,
    spans: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """fits (2, 16, n): scale, sum of the weights; L (256, n): integers with 4 added."""
    group, lane = group_lanes(n, 16, LANES)
    rows = load_rows(x, group * 16, n, lane, 16)
    if WEIGHTED:
        weight = load_rows(importance, group * 16, per_row, lane % per_row, 16)
        w = weigh(rows, weight, load_row(sigma2, 0, n, lane))
        scale, inverse, tiny = fit_qx(rows, w, spans, 4)
        store_row(fits, 16 + group, n, lane, serial_sum(w))
        _store_integers(rows, inverse, tiny, 4, L, group, n, lane)
    else:
        scale, integers = fit_q3(rows, 4)
        for i in tl.static_range(16):
            store_row(L, group * 16 + i, n, lane, integers[i].to(tl.uint8))
    store_row(fits, group, n, lane, scale)


@triton.jit
def _search_q6(
    x: tl.tensor,
    importance: tl.tensor,
    fits: tl.tensor,
    L: tl.tensor,
    spans: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """fits (16, n): scale; L (256, n): integers with 32 added. The importance itself is the weight here."""
    group, lane = group_lanes(n, 16, LANES)
    rows = load_rows(x, group * 16, n, lane, 16)
    if WEIGHTED:
        w = load_rows(importance, group * 16, per_row, lane % per_row, 16)
    else:
        w = squares(rows)
    scale, inverse, tiny = fit_qx(rows, w, spans, 32)
    store_row(fits, group, n, lane, scale)
    _store_integers(rows, inverse, tiny, 32, L, group, n, lane)


@triton.jit
def _store_integers(
    rows: tl.tuple,
    inverse: tl.tensor,
    tiny: tl.tensor,
    NMAX: tl.constexpr,
    L: tl.tensor,
    group: tl.tensor,
    n: tl.tensor,
    lane: tl.tensor,
) -> tl.tensor:
    for i in tl.static_range(16):
        q = nearest_clipped(inverse * rows[i], -NMAX, NMAX - 1) + NMAX
        store_row(L, group * 16 + i, n, lane, tl.where(tiny, 0.0, q).to(tl.uint8))


@triton.jit
def _requantized(
    x: tl.tensor,
    L: tl.tensor,
    row: tl.tensor,
    step: tl.tensor,
    NMAX: tl.constexpr,
    n: tl.tensor,
    lane: tl.tensor,
) -> tl.tensor:
    """The integer of a row against the scale as stored; a lane without a step keeps the search's."""
    q = nearest_clipped(tl.div_rn(load_row(x, row, n, lane), step), -NMAX, NMAX - 1) + NMAX
    return tl.where(step != 0, q.to(tl.int32), load_row(L, row, n, lane).to(tl.int32))


@triton.jit
def _finish_q3(
    x: tl.tensor,
    fits: tl.tensor,
    L: tl.tensor,
    out: tl.tensor,
    spans: tl.tensor,
    n: tl.tensor,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    lane = block_lanes(LANES)
    scales = load_rows(fits, 0, n, lane, 16)
    codes = ()
    if WEIGHTED:
        d, inverse, tiny = fit_qx(scales, load_rows(fits, 16, n, lane, 16), spans, 32)
        for g in tl.static_range(16):
            code = nearest_clipped(inverse * scales[g], -32, 31).to(tl.int32) + 32
            codes = codes + (tl.where(tiny, 0, code),)
    else:
        greatest = largest(scales)
        inverse = tl.div_rn(like(greatest, -32.0), greatest)
        d = tl.where(greatest != 0, tl.div_rn(like(greatest, 1.0), inverse), 0.0)
        for g in tl.static_range(16):
            # The integer passes through an int8 before it is clipped.
            code = (nearest_int(inverse * scales[g]) << 24) >> 24
            code = tl.maximum(tl.minimum(code, 31), -32) + 32
            codes = codes + (tl.where(greatest != 0, code, 0),)
    half = to_half(d)
    store_half(out, 108, n, lane, half)
    for g in tl.static_range(8):
        byte = (codes[g] & 15) | ((codes[g + 8] & 15) << 4)
        store_row(out, 96 + g, n, lane, byte.to(tl.uint8))
    for g in tl.static_range(4):
        byte = codes[g] >> 4
        for k in tl.static_range(1, 4):
            byte = byte | ((codes[g + 4 * k] >> 4) << (2 * k))
        store_row(out, 104 + g, n, lane, byte.to(tl.uint8))
    steps = ()
    for g in tl.static_range(16):
        steps = steps + (from_half(half) * (codes[g] - 32).to(tl.float32),)
    for part in tl.static_range(2):
        for i in range(16):
            high = tl.full(lane.shape, 0, tl.int32)
            for half_block in tl.static_range(2):
                low = tl.full(lane.shape, 0, tl.int32)
                for k in tl.static_range(4):
                    row = 128 * half_block + 32 * k + 16 * part + i
                    q = _requantized(x, L, row, steps[8 * half_block + 2 * k + part], 4, n, lane)
                    low = low | ((q & 3) << (2 * k))
                    high = high | ((q >> 2) << (4 * half_block + k))
                store_row(out, 32 + 32 * half_block + 16 * part + i, n, lane, low.to(tl.uint8))
            store_row(out, 16 * part + i, n, lane, high.to(tl.uint8))


@triton.jit
def _finish_q6(
    x: tl.tensor, fits: tl.tensor, L: tl.tensor, out: tl.tensor, n: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    lane = block_lanes(LANES)
    scales = load_rows(fits, 0, n, lane, 16)
    greatest = largest(scales)
    empty = tl.abs(greatest) < GROUP_MAX_EPS
    inverse = tl.div_rn(like(greatest, -128.0), greatest)
    half = to_half(tl.div_rn(like(greatest, 1.0), inverse))
    store_half(out, 208, n, lane, tl.where(empty, 0, half))
    steps = ()
    for g in tl.static_range(16):
        # The code is an int8, whatever the search handed on.
        code = (tl.minimum(nearest_int(inverse * scales[g]), 127) << 24) >> 24
        store_row(out, 192 + g, n, lane, tl.where(empty, 0, code).to(tl.uint8))
        steps = steps + (from_half(half) * code.to(tl.float32),)
    for part in tl.static_range(2):
        for i in range(16):
            for half_block in tl.static_range(2):
                high = tl.full(lane.shape, 0, tl.int32)
                low = tl.full(lane.shape, 0, tl.int32)
                other_low = tl.full(lane.shape, 0, tl.int32)
                for k in tl.static_range(4):
                    row = 128 * half_block + 32 * k + 16 * part + i
                    q = _requantized(x, L, row, steps[8 * half_block + 2 * k + part], 32, n, lane)
                    q = tl.where(empty, 0, q)
                    high = high | ((q >> 4) << (2 * k))
                    if k % 2 == 0:
                        low = low | ((q & 15) << (2 * k))
                    else:
                        other_low = other_low | ((q & 15) << (2 * k - 2))
                at = 16 * part + i
                store_row(out, 64 * half_block + at, n, lane, low.to(tl.uint8))
                store_row(out, 64 * half_block + 32 + at, n, lane, other_low.to(tl.uint8))
                store_row(out, 128 + 32 * half_block + at, n, lane, high.to(tl.uint8))
