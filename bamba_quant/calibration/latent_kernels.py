"""Latent codes to weights, and gradients of weights back to latent codes with the optimizer's step, in a kernel each.

A latent code is three arrays (rows, columns) in the file's order: ``places``, uint8, the file's code counted from the
lowest of its grid; ``latents``, int16, the offset from it in 1/16384; for the optimizer ``first``, bfloat16, the mean
gradient, ``second``, uint8, the mean squared gradient by its logarithm, and ``means``, int16, the running mean of
``latents``. What is narrower than the step that is added to it is rounded up or down at random, in proportion to the
distance, so that small steps add up; the random numbers are a function of the seed and the place alone.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

UNIT = 16384  # of latents: 2 is out of int16's range by one
QUARTERS = 4  # values of ``second`` between a number and twice the number

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds half to even


@triton.jit
def code_values(place: tl.tensor, lowest: tl.tensor, table: tl.tensor, last: tl.tensor) -> tl.tensor:
    """The value of each code, float32, of whole places, also float32."""
    if table is None:
        return place + lowest
    else:
        return tl.load(table + tl.minimum(tl.maximum(place, 0), last).to(tl.int32))


@triton.jit
def make_weights(
    places: tl.tensor,
    latents: tl.tensor,
    steps: tl.tensor,
    lows: tl.tensor,
    table: tl.tensor,
    targets: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    lowest: tl.tensor,
    last: tl.tensor,
    UNIT: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """step · value(round(place + latent)) - low, times the row's factor, to row ``targets`` of out (rows, columns).

    ``steps`` and ``lows`` (rows, groups) are of ``group`` weights each. With ``ROUNDED`` a weight is rounded to that
    type before its factor, as a loader of the file rounds it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (rows, 1)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]  # (1, columns)
    here = (row < rows) & (c < columns)
    offset = tl.load(latents + row * columns + c, mask=here, other=0).to(tl.float32) / UNIT
    place = tl.load(places + row * columns + c, mask=here, other=0).to(tl.float32)
    value = code_values(place + ((offset + _ROUNDER) - _ROUNDER), lowest, table, last)
    w = value * tl.load(steps + row * groups + c // group, mask=here, other=0)
    if lows is not None:
        w -= tl.load(lows + row * groups + c // group, mask=here, other=0)
    if ROUNDED is not None:
        w = w.to(ROUNDED).to(tl.float32)
    target = row
    if targets is not None:
        target = tl.load(targets + row, mask=row < rows, other=0)
    if factors is not None:
        w *= tl.load(factors + target, mask=row < rows, other=0)
    tl.store(out + target * columns + c, w.to(out.dtype.element_ty), mask=here)


@triton.jit
def learn_codes(
    gradient: tl.tensor,
    places: tl.tensor,
    latents: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    means: tl.tensor,
    steps: tl.tensor,
    table: tl.tensor,
    targets: tl.tensor,
    factors: tl.tensor,
    top: tl.tensor,
    of_steps: tl.tensor,
    of_lows: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    lowest: tl.tensor,
    last: tl.tensor,
    reach: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    mean_weight: tl.tensor,
    seed: tl.tensor,
    UNIT: tl.constexpr,
    QUARTERS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """One step of Adam on latent codes, from ``gradient`` (rows, columns) of the weights in the reference's order.

    The gradient passes rounding as it is, and from a value of a table to the place along the line between its
    neighbours. ``of_steps`` and ``of_lows`` (rows, pieces of ``WIDTH`` weights) are the sums that steps and lows have
    as their gradients. ``top`` is the logarithm to base 2 of the greatest squared gradient that ``second`` can hold.
    """
    e = tl.arange(0, ROWS * PIECES)
    row = tl.program_id(0).to(tl.int64) * ROWS + (e // PIECES)[:, None]  # (rows · pieces, 1)
    piece = tl.program_id(1) * PIECES + (e % PIECES)[:, None]
    c = piece * WIDTH + tl.arange(0, WIDTH)[None, :]  # (rows · pieces, width)
    here = (row < rows) & (c < columns)
    at = row * columns + c
    target = row
    if targets is not None:
        target = tl.load(targets + row, mask=row < rows, other=0)
    g = tl.load(gradient + target * columns + c, mask=here, other=0).to(tl.float32)
    if factors is not None:
        g *= tl.load(factors + target, mask=row < rows, other=0)
    place = tl.load(places + at, mask=here, other=0).to(tl.float32)
    offset = tl.load(latents + at, mask=here, other=0).to(tl.float32) / UNIT
    value = code_values(place + ((offset + _ROUNDER) - _ROUNDER), lowest, table, last)
    there = (row < rows) & (piece * WIDTH < columns)
    sums = row * tl.cdiv(columns, WIDTH) + piece
    tl.store(of_steps + sums, tl.sum(tl.where(here, g * value, 0), 1, keep_dims=True), mask=there)
    tl.store(of_lows + sums, -tl.sum(g, 1, keep_dims=True), mask=there)
    g *= tl.load(steps + row * groups + c // group, mask=here, other=0)
    if table is not None:
        low = tl.minimum(tl.maximum(tl.floor(place + offset), 0), last - 1).to(tl.int32)
        g *= tl.load(table + low + 1) - tl.load(table + low)
    mean = tl.load(first + at, mask=here, other=0).to(tl.float32)
    mean += (g - mean) * (1 - beta1)
    most = tl.load(top)
    square = tl.load(second + at, mask=here, other=0).to(tl.float32)
    square = tl.where(square > 0, tl.exp2((square - 255) / QUARTERS + most), 0)
    square = square * beta2 + g * g * (1 - beta2)
    moved = offset - rate * mean / (tl.sqrt(square) + eps)
    moved = tl.minimum(tl.maximum(moved, -reach), reach)
    moved = tl.minimum(tl.maximum(moved, -place), last - place)
    # Four independent bytes of chance for each number; sixteen bits for the latent, whose steps are the smallest.
    chance = tl.randint(seed, at.to(tl.uint32)).to(tl.uint32, bitcast=True)
    latent = tl.floor(moved * UNIT + (chance & 65535).to(tl.float32) / 65536)
    latent = tl.minimum(tl.maximum(latent, -32768), 32767)
    logarithm = tl.log2(tl.maximum(square, 1e-38)) - most
    code = tl.floor(logarithm * QUARTERS + 255 + ((chance >> 16) & 255).to(tl.float32) / 256)
    code = tl.where(square > 0, tl.minimum(tl.maximum(code, 1), 255), 0)
    past = tl.load(means + at, mask=here, other=0).to(tl.float32)
    past = tl.floor(past + (latent - past) * mean_weight + (chance >> 24).to(tl.float32) / 256)
    tl.store(first + at, mean.to(tl.bfloat16), mask=here)
    tl.store(second + at, code.to(tl.uint8), mask=here)
    tl.store(latents + at, latent.to(tl.int16), mask=here)
    tl.store(means + at, tl.minimum(tl.maximum(past, -32768), 32767).to(tl.int16), mask=here)
