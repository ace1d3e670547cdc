"""Experts in Triton: one launch for the matrices of all experts, without the host learning which tokens go where.

The T k pairs of a token and one of its experts are sorted by expert. A program multiplies a tile of rows that belong to
one expert; the tiles are counted on the device, and programs beyond the last return at once.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import check, padded

_COLUMNS = 1024


@dataclass(frozen=True)
class ExpertTuning:
    """The most rows, outputs and terms of a tile, and a program's warps and stages."""

    rows: int = 128
    outputs: int = 128
    terms: int = 64
    warps: int = 8
    stages: int = 3


DEFAULT = ExpertTuning()


@dataclass(frozen=True)
class _Tiles:
    """``pair`` (T k,): pairs sorted by expert. For each tile, its expert and its rows from ``start`` to ``stop``."""

    pair: Tensor
    expert: Tensor
    start: Tensor
    stop: Tensor


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    tuning: ExpertTuning = DEFAULT,
) -> Tensor:
    """``Backend.experts``: the weighted sum of each token's experts, float32 (T, d).

    x (T, d), chosen and weights (T, k), up and gate (E, I, d), down (E, d, I). An expert is SwiGLU with ``gate`` and
    ReLU² without. Products are summed in float32 and rounded to x's dtype, as those of other matrices are.
    """
    check(x)
    (T, k), (E, inner, d) = chosen.shape, up.shape
    # Of few rows an expert gets few: smaller tiles then waste less.
    rows = padded(T * k // E, most=tuning.rows)
    tiles = _tiles(chosen, E, rows)
    x, up, down = x.contiguous(), up.contiguous(), down.contiguous()
    gate = None if gate is None else gate.contiguous()
    hidden = torch.empty(T * k, inner, dtype=x.dtype, device=x.device)  # sorted
    _product(x, up, gate, hidden, tiles, rows, tuning, per_token=k, relu2=gate is None)
    out = torch.empty(T * k, d, dtype=x.dtype, device=x.device)  # in the order of pairs
    _product(hidden, down, None, out, tiles, rows, tuning, per_token=0, relu2=False)
    y = torch.empty(T, d, dtype=torch.float32, device=x.device)
    _weighted_sum[(T, -(-d // _COLUMNS))](out, weights.contiguous(), y, k, d, COLUMNS=_COLUMNS)
    return y


def _tiles(chosen: Tensor, count: int, rows: int) -> _Tiles:
    """Tiles of at most ``rows`` rows of the pairs sorted by their expert, of ``count``: as many as there can be."""
    expert, pair = chosen.flatten().sort()
    every = torch.arange(count + 1, device=chosen.device)
    borders = torch.searchsorted(expert, every)  # (E + 1,): the first row of each expert
    tiles = (borders.diff() + rows - 1) // rows  # (E,)
    last = tiles.cumsum(0)
    number = torch.arange(min(len(pair), len(pair) // rows + count), device=chosen.device)
    of = torch.searchsorted(last, number, right=True)  # (tiles,), E for those beyond the last
    first = torch.cat([last - tiles, last[-1:]])  # (E + 1,)
    start = borders[of] + (number - first[of]) * rows
    stop = torch.cat([borders[1:], borders.new_zeros(1)])[of]
    return _Tiles(pair, of, start, torch.minimum(stop, start + rows))


def _product(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    out: Tensor,
    tiles: _Tiles,
    rows: int,
    tuning: ExpertTuning,
    *,
    per_token: int,
    relu2: bool,
) -> None:
    """Rows of x by their expert's matrix, and by its gate's if given, activated.

    ``per_token`` > 0: x (T, d) by token, each with as many pairs, out (T k, I) sorted. 0: x sorted, out by pair.
    """
    _, outputs, terms = weight.shape
    columns = padded(outputs, most=tuning.outputs if gate is None else tuning.outputs // 2)
    _expert_product[(len(tiles.expert) * -(-outputs // columns),)](
        x,
        weight,
        gate,
        out,
        tiles.pair,
        tiles.expert,
        tiles.start,
        tiles.stop,
        outputs,
        terms,
        PER_TOKEN=per_token,
        RELU2=relu2,
        ROWS=rows,
        OUTPUTS=columns,
        TERMS=padded(terms, most=tuning.terms),
        num_warps=tuning.warps if rows > 32 else 4,
        num_stages=tuning.stages,
    )


@triton.jit
def _expert_product(
    x: tl.tensor,
    weight: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    pair: tl.tensor,
    expert: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    outputs: tl.tensor,
    terms: tl.tensor,
    PER_TOKEN: tl.constexpr,
    RELU2: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
) -> None:
    # Programs of one tile are neighbours, so that the rows of x and the expert's matrix stay in the cache.
    columns = tl.cdiv(outputs, OUTPUTS)
    tile, n = tl.program_id(0) // columns, tl.program_id(0) % columns * OUTPUTS + tl.arange(0, OUTPUTS)
    first, end = tl.load(start + tile), tl.load(stop + tile)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)  # (m,)
    here = row < end
    of = tl.load(pair + row, mask=here, other=0).to(tl.int64)
    source = of // PER_TOKEN if PER_TOKEN > 0 else row.to(tl.int64)
    target = row.to(tl.int64) if PER_TOKEN > 0 else of
    k = tl.arange(0, TERMS)
    at = x + source[:, None] * terms + k[None, :]  # (m, k)
    matrix = tl.load(expert + tile).to(tl.int64) * outputs * terms
    by = n[None, :] * terms + k[:, None]  # (k, n)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    second = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, terms, TERMS):
        inside = begin + k < terms
        v = tl.load(at + begin, mask=here[:, None] & inside[None, :], other=0)
        kept = inside[:, None] & (n < outputs)[None, :]
        total = tl.dot(
            v, tl.load(weight + matrix + by + begin, mask=kept, other=0), total, input_precision="ieee"
        )
        if gate is not None:
            second = tl.dot(
                v, tl.load(gate + matrix + by + begin, mask=kept, other=0), second, input_precision="ieee"
            )
    if gate is not None:
        total = second / (1 + tl.exp(-second)) * total
    if RELU2:
        total = tl.maximum(total, 0) * tl.maximum(total, 0)
    tl.store(
        out + target[:, None] * outputs + n[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & (n < outputs)[None, :],
    )


@triton.jit
def _weighted_sum(
    out: tl.tensor, weights: tl.tensor, y: tl.tensor, k: tl.tensor, d: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for r in range(k):
        weight = tl.load(weights + t * k + r).to(tl.float32)
        total += weight * tl.load(out + (t * k + r) * d + c, mask=c < d, other=0).to(tl.float32)
    tl.store(y + t * d + c, total, mask=c < d)
