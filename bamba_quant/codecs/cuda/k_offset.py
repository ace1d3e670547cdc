"""Q2_K, Q4_K and Q5_K in Triton: kernels search each group, code the scales, and pack each block."""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import (
    block_lanes,
    from_half,
    group_lanes,
    like,
    load_codes,
    load_row,
    load_rows,
    nearest_clipped,
    nearest_int,
    store_half,
    store_row,
    to_half,
)
from bamba_quant.codecs.cuda.launch import Blocks, encoder
from bamba_quant.codecs.cuda.search import fit_qkx, fit_qp, serial_sum, squares, weigh
from bamba_quant.codecs.k_offset import Q2, Q4, Q5, KQuantLayout
from bamba_quant.codecs.search import spans_around


@encoder("q2_k")
def _q2_k(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, Q2, 84)


@encoder("q4_k")
def _q4_k(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, Q4, 144)


@encoder("q5_k")
def _q5_k(blocks: Blocks) -> torch.Tensor:
    return _encode(blocks, Q5, 176)


def _encode(blocks: Blocks, kind: KQuantLayout, size: int) -> torch.Tensor:
    weighted = blocks.importance is not None
    groups = 256 // kind.group
    grid = kind.weighted if weighted else kind.plain
    sigma2, fits, d, out = blocks.floats(1), blocks.floats(5, groups), blocks.floats(2), blocks.bytes(size)
    if weighted:
        blocks.launch(square_sum, blocks.x, sigma2, FACTOR=float(kind.sigma_factor))
    blocks.launch(
        _search,
        blocks.x,
        blocks.weights,
        sigma2,
        fits,
        blocks.constants(kind.nmax, grid.spans),
        len(grid.spans) + 1,
        blocks.per_row,
        groups=groups,
        GROUP=kind.group,
        NMAX=kind.nmax,
        ABSOLUTE=kind.absolute and not weighted,
        WEIGHTED=weighted,
    )
    blocks.launch(
        _code_levels,
        fits,
        d,
        blocks.constants(spans_around(kind.levels, 4)),
        groups=2,
        GROUPS=groups,
        LEVELS=kind.levels,
        WEIGHTED=weighted,
    )
    blocks.launch(
        _finish, blocks.x, fits, d, out, BITS=kind.bits, GROUPS=groups, CAPPED=kind.capped[weighted]
    )
    return out


@triton.jit
def square_sum(
    x: tl.tensor, out: tl.tensor, n: tl.tensor, FACTOR: tl.constexpr, LANES: tl.constexpr
) -> tl.tensor:
    """FACTOR · Σ x² / 256 over each block, serially."""
    lane = block_lanes(LANES)
    total = tl.full((LANES,), 0.0, tl.float32)
    for first in range(0, 256, 16):
        rows = load_rows(x, first, n, lane, 16)
        for i in tl.static_range(16):
            total = total + rows[i] * rows[i]
    store_row(out, 0, n, lane, total * FACTOR * (1.0 / 256.0))


@triton.jit
def _search(
    x: tl.tensor,
    importance: tl.tensor,
    sigma2: tl.tensor,
    fits: tl.tensor,
    spans: tl.tensor,
    n_spans: tl.tensor,
    per_row: tl.tensor,
    n: tl.tensor,
    GROUP: tl.constexpr,
    NMAX: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """fits (5, groups, n): scale, minimum, inverse and origin of the integers, sum of the weights."""
    groups = 256 // GROUP
    group, lane = group_lanes(n, groups, LANES)
    rows = load_rows(x, group * GROUP, n, lane, GROUP)
    if WEIGHTED:
        weight = load_rows(importance, group * GROUP, per_row, lane % per_row, GROUP)
        w = weigh(rows, weight, load_row(sigma2, 0, n, lane))
        store_row(fits, 4 * groups + group, n, lane, serial_sum(w))
    else:
        w = _plain_weights(rows, ABSOLUTE, GROUP)
    scale, low, inverse, origin = fit_qkx(rows, w, spans, n_spans, NMAX, ABSOLUTE)
    store_row(fits, group, n, lane, scale)
    store_row(fits, groups + group, n, lane, low * -1.0)
    store_row(fits, 2 * groups + group, n, lane, inverse)
    store_row(fits, 3 * groups + group, n, lane, origin)


@triton.jit
def _plain_weights(rows: tl.tuple, ABSOLUTE: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    weights = ()
    root = tl.sqrt_rn(serial_sum(squares(rows)) * (1.0 / GROUP))
    for i in tl.static_range(GROUP):
        weights = weights + (tl.abs(rows[i]) if ABSOLUTE else root + tl.abs(rows[i]),)
    return weights


@triton.jit
def _code(values: tl.tuple, LEVELS: tl.constexpr) -> tl.tensor:
    """Codes of the values as multiples of what is returned; see ``bamba_quant.codecs.k_offset``."""
    greatest = like(values[0], 0.0)
    for g in tl.static_range(len(values)):
        greatest = tl.where(values[g] > greatest, values[g], greatest)
    inverse = tl.where(greatest > 0, tl.div_rn(like(greatest, LEVELS), greatest), 0.0)
    codes = ()
    for g in tl.static_range(len(values)):
        codes = codes + (tl.where(greatest > 0, nearest_int(inverse * values[g]) & 255, 0),)
    return tl.div_rn(greatest, like(greatest, LEVELS)), codes


@triton.jit
def _code_levels(
    fits: tl.tensor,
    d: tl.tensor,
    spans: tl.tensor,
    n: tl.tensor,
    GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """Codes replace a block's scales (kind 0) and minima (kind 1); d (2, n) is what they multiply."""
    kind, lane = group_lanes(n, 2, LANES)
    values = load_rows(fits, kind * GROUPS, n, lane, GROUPS)
    if WEIGHTED:
        scale, codes = fit_qp(values, load_rows(fits, 4 * GROUPS, n, lane, GROUPS), spans, LEVELS)
    else:
        scale, codes = _code(values, LEVELS)
    store_row(d, kind, n, lane, scale)
    for g in tl.static_range(GROUPS):
        store_row(fits, kind * GROUPS + g, n, lane, codes[g].to(tl.float32))


@triton.jit
def _finish(
    x: tl.tensor,
    fits: tl.tensor,
    d: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    lane = block_lanes(LANES)
    scale_codes = load_codes(fits, 0, n, lane, GROUPS)
    minimum_codes = load_codes(fits, GROUPS, n, lane, GROUPS)
    half_d = to_half(load_row(d, 0, n, lane))
    half_dmin = to_half(load_row(d, 1, n, lane))
    head = 80 if BITS == 2 else 0
    store_half(out, head, n, lane, half_d)
    store_half(out, head + 2, n, lane, half_dmin)
    if BITS == 2:
        scale_codes, minimum_codes = _pack_bytes(scale_codes, minimum_codes, out, n, lane)
    else:
        scale_codes, minimum_codes = _pack_six_bits(scale_codes, minimum_codes, CAPPED, out, n, lane)
    steps = ()
    lows = ()
    for g in tl.static_range(GROUPS):
        steps = steps + (from_half(half_d) * scale_codes[g].to(tl.float32),)
        lows = lows + (from_half(half_dmin) * minimum_codes[g].to(tl.float32),)
    inverses = load_rows(fits, 2 * GROUPS, n, lane, GROUPS)
    origins = load_rows(fits, 3 * GROUPS, n, lane, GROUPS)
    if BITS == 2:
        _pack_crumbs(x, steps, lows, inverses, origins, out, n, lane)
    else:
        _pack_nibbles(x, steps, lows, inverses, origins, out, n, lane, BITS)


@triton.jit
def _pack_bytes(
    scales: tl.tensor, minima: tl.tensor, out: tl.tensor, n: tl.tensor, lane: tl.tensor
) -> tl.tensor:
    """Q2_K's codes, and what a reader will see in them."""
    seen_scales = ()
    seen_minima = ()
    for g in tl.static_range(16):
        byte = (scales[g] | (minima[g] << 4)) & 255
        store_row(out, g, n, lane, byte.to(tl.uint8))
        seen_scales = seen_scales + (byte & 15,)
        seen_minima = seen_minima + (byte >> 4,)
    return seen_scales, seen_minima


@triton.jit
def _pack_six_bits(
    scales: tl.tensor, minima: tl.tensor, CAPPED: tl.constexpr, out: tl.tensor, n: tl.tensor, lane: tl.tensor
) -> tl.tensor:
    """The twelve bytes of Q4_K's and Q5_K's codes, and what a reader will see in them."""
    low_scales = ()
    low_minima = ()
    high_scales = ()
    high_minima = ()
    for g in tl.static_range(4):
        scale, high_scale = _capped(scales[g], CAPPED), _capped(scales[g + 4], CAPPED)
        low, high_low = _capped(minima[g], CAPPED), _capped(minima[g + 4], CAPPED)
        scale = (scale | ((high_scale >> 4) << 6)) & 255
        low = (low | ((high_low >> 4) << 6)) & 255
        store_row(out, 4 + g, n, lane, scale.to(tl.uint8))
        store_row(out, 8 + g, n, lane, low.to(tl.uint8))
        store_row(out, 12 + g, n, lane, ((high_scale & 15) | ((high_low & 15) << 4)).to(tl.uint8))
        low_scales = low_scales + (scale & 63,)
        low_minima = low_minima + (low & 63,)
        high_scales = high_scales + ((high_scale & 15) | ((scale >> 6) << 4),)
        high_minima = high_minima + ((high_low & 15) | ((low >> 6) << 4),)
    return low_scales + high_scales, low_minima + high_minima


@triton.jit
def _capped(code: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    return tl.minimum(code, 63) if CAPPED else code


@triton.jit
def _of_group(
    steps: tl.tuple, lows: tl.tuple, inverses: tl.tuple, origins: tl.tuple, g: tl.constexpr
) -> tl.tuple:
    return steps[g], lows[g], inverses[g], origins[g]


@triton.jit
def _requantize(value: tl.tensor, group: tl.tuple, NMAX: tl.constexpr) -> tl.tensor:
    """An integer against the codes as stored; a lane without a step keeps what the search had."""
    step, low, inverse, origin = group
    fitted = nearest_clipped(tl.div_rn(value + low, step), 0, NMAX)
    kept = nearest_clipped(inverse * (value - origin), 0, NMAX)
    return tl.where(step != 0, fitted, kept).to(tl.int32)


@triton.jit
def _pack_crumbs(
    x: tl.tensor,
    steps: tl.tensor,
    lows: tl.tensor,
    inverses: tl.tensor,
    origins: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    lane: tl.tensor,
) -> tl.tensor:
    for first in tl.static_range(0, 256, 128):
        for part in tl.static_range(2):
            for i in range(16):
                byte = tl.full(lane.shape, 0, tl.int32)
                for k in tl.static_range(4):
                    value = load_row(x, first + 32 * k + 16 * part + i, n, lane)
                    group = _of_group(steps, lows, inverses, origins, first // 16 + 2 * k + part)
                    q = _requantize(value, group, 3)
                    byte = byte | (q << (2 * k))
                store_row(out, 16 + first // 4 + 16 * part + i, n, lane, byte.to(tl.uint8))


@triton.jit
def _pack_nibbles(
    x: tl.tensor,
    steps: tl.tensor,
    lows: tl.tensor,
    inverses: tl.tensor,
    origins: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    lane: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    at: tl.constexpr = 48 if BITS == 5 else 16
    NMAX: tl.constexpr = (1 << BITS) - 1
    for i in range(32):
        fifth = tl.full(lane.shape, 0, tl.int32)
        for j in tl.static_range(4):
            low = load_row(x, 64 * j + i, n, lane)
            high = load_row(x, 64 * j + 32 + i, n, lane)
            q0 = _requantize(low, _of_group(steps, lows, inverses, origins, 2 * j), NMAX)
            q1 = _requantize(high, _of_group(steps, lows, inverses, origins, 2 * j + 1), NMAX)
            store_row(out, at + 32 * j + i, n, lane, ((q0 & 15) | ((q1 & 15) << 4)).to(tl.uint8))
            fifth = fifth | ((q0 >> 4) << (2 * j)) | ((q1 >> 4) << (2 * j + 1))
        if BITS == 5:
            store_row(out, 16 + i, n, lane, fifth.to(tl.uint8))
