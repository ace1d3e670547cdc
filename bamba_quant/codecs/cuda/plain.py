"""F32, F16, BF16, Q8_0, TQ1_0, TQ2_0 and MXFP4 on a GPU: formats without a search."""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import (
    block_lanes,
    floor_int,
    like,
    load_row,
    load_rows,
    reciprocal,
    round_half_away,
    store_half,
    store_row,
    to_half,
)
from bamba_quant.codecs.cuda.launch import Blocks, encoder
from bamba_quant.codecs.mxfp4 import VALUES

_VALUES: tl.constexpr = tl.constexpr(tuple(float(value) for value in VALUES))


@encoder("f32")
def _f32(blocks: Blocks) -> torch.Tensor:
    return _bytes_of(blocks.rows)


@encoder("f16")
def _f16(blocks: Blocks) -> torch.Tensor:
    return _bytes_of(blocks.rows.to(torch.float16))


@encoder("bf16")
def _bf16(blocks: Blocks) -> torch.Tensor:
    return _bytes_of(blocks.rows.to(torch.bfloat16))


def _bytes_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, 1).contiguous().view(torch.uint8).t()


@encoder("q8_0")
def _q8_0(blocks: Blocks) -> torch.Tensor:
    out = blocks.bytes(34)
    blocks.launch(_quantize_q8, blocks.x, out)
    return out


@encoder("tq1_0")
def _tq1_0(blocks: Blocks) -> torch.Tensor:
    out = blocks.bytes(54)
    blocks.launch(_quantize_tq1, blocks.x, out)
    return out


@encoder("tq2_0")
def _tq2_0(blocks: Blocks) -> torch.Tensor:
    out = blocks.bytes(66)
    blocks.launch(_quantize_tq2, blocks.x, out)
    return out


@encoder("mxfp4")
def _mxfp4(blocks: Blocks) -> torch.Tensor:
    out = blocks.bytes(17)
    blocks.launch(_quantize_mxfp4, blocks.x, out)
    return out


@triton.jit
def _greatest(x: tl.tensor, n: tl.tensor, lane: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """The greatest magnitude of N rows; no order of comparing numbers changes it."""
    greatest = tl.full(lane.shape, 0.0, tl.float32)
    for first in range(0, N, 16):
        for i in tl.static_range(16):
            greatest = tl.maximum(greatest, tl.abs(load_row(x, first + i, n, lane)))
    return greatest


@triton.jit
def _quantize_q8(x: tl.tensor, out: tl.tensor, n: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    lane = block_lanes(LANES)
    rows = load_rows(x, 0, n, lane, 32)
    greatest = tl.full(lane.shape, 0.0, tl.float32)
    for i in tl.static_range(32):
        greatest = tl.maximum(greatest, tl.abs(rows[i]))
    d = tl.div_rn(greatest, like(greatest, 127.0))
    store_half(out, 0, n, lane, to_half(d))
    inverse = reciprocal(d)
    for i in tl.static_range(32):
        store_row(out, 2 + i, n, lane, round_half_away(rows[i] * inverse).to(tl.uint8))


@triton.jit
def _trit(x: tl.tensor, row: tl.tensor, inverse: tl.tensor, n: tl.tensor, lane: tl.tensor) -> tl.tensor:
    return (round_half_away(load_row(x, row, n, lane) * inverse) + 1) & 3


@triton.jit
def _quantize_tq1(x: tl.tensor, out: tl.tensor, n: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    lane = block_lanes(LANES)
    d = _greatest(x, n, lane, 256)
    store_half(out, 52, n, lane, to_half(d))
    inverse = reciprocal(d)
    _pack_trits(x, 0, 32, 5, inverse, out, 0, n, lane)
    _pack_trits(x, 160, 16, 5, inverse, out, 32, n, lane)
    _pack_trits(x, 240, 4, 4, inverse, out, 48, n, lane)


@triton.jit
def _pack_trits(
    x: tl.tensor,
    first: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    inverse: tl.tensor,
    out: tl.tensor,
    at: tl.constexpr,
    n: tl.tensor,
    lane: tl.tensor,
) -> tl.tensor:
    for i in range(SIZE):
        number = tl.full(lane.shape, 0, tl.int32)
        for k in tl.static_range(5):
            number = number * 3
            if k < COUNT:
                number = number + _trit(x, first + k * SIZE + i, inverse, n, lane)
        store_row(out, at + i, n, lane, ((number * 256 + 242) // 243).to(tl.uint8))


@triton.jit
def _quantize_tq2(x: tl.tensor, out: tl.tensor, n: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    lane = block_lanes(LANES)
    d = _greatest(x, n, lane, 256)
    store_half(out, 64, n, lane, to_half(d))
    inverse = reciprocal(d)
    for first in tl.static_range(0, 256, 128):
        for i in range(32):
            byte = tl.full(lane.shape, 0, tl.int32)
            for k in tl.static_range(4):
                byte = byte | (_trit(x, first + 32 * k + i, inverse, n, lane) << (2 * k))
            store_row(out, first // 4 + i, n, lane, byte.to(tl.uint8))


@triton.jit
def _nearest_value(value: tl.tensor, d: tl.tensor) -> tl.tensor:
    index = tl.full(value.shape, 0, tl.int32)
    best = tl.abs(_VALUES[0] * d - value)
    for i in tl.static_range(1, 16):
        error = tl.abs(_VALUES[i] * d - value)
        nearer = error < best
        index = tl.where(nearer, i, index)
        best = tl.where(nearer, error, best)
    return index


@triton.jit
def _quantize_mxfp4(x: tl.tensor, out: tl.tensor, n: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    lane = block_lanes(LANES)
    greatest = _greatest(x, n, lane, 32)
    # As bamba_quant.codecs.mxfp4.exponents: the logarithm is rounded to float32 before its floor is taken.
    logarithm = tl.log2(tl.where(greatest > 0, greatest, 1.0).to(tl.float64)).to(tl.float32)
    e = tl.where(greatest > 0, (floor_int(logarithm) + 125) & 255, 0)
    store_row(out, 0, n, lane, e.to(tl.uint8))
    d = tl.where(e < 2, (e + 1) * 0x00200000, (e - 1) << 23).to(tl.float32, bitcast=True)
    for i in range(16):
        low = _nearest_value(load_row(x, i, n, lane), d)
        high = _nearest_value(load_row(x, 16 + i, n, lane), d)
        store_row(out, 1 + i, n, lane, (low | (high << 4)).to(tl.uint8))
