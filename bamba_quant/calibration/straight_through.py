"""Rounding to a grid with straight-through gradients, and the grids of codecs whose codes index a table."""
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.fields import FieldLayout


def rounded(x: Tensor) -> Tensor:
    """x rounded half to even; the gradient passes as it is."""
    y: Tensor = _Round.apply(x)
    return y


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to a narrower float and back; the gradient passes as it is."""
    y: Tensor = _Narrow.apply(x, dtype)
    return y


def looked_up(offset: Tensor, start: Tensor, table: Tensor) -> Tensor:
    """The rising table's value at place start + round(offset); the gradient is that of the line between neighbours."""
    y: Tensor = _LookUp.apply(offset, start, table)
    return y


def sorted_table(layout: FieldLayout) -> tuple[F32 | None, NDArray[np.int16] | None]:
    """The distinct values of a table in rising order, and the place of each code among them."""
    if layout.table is None:
        return None, None
    finite = np.where(np.isfinite(layout.table), layout.table, np.float32(0))
    values, places = np.unique(finite + np.float32(0), return_inverse=True)
    return values, places.astype(np.int16)


def codes_of(layout: FieldLayout, values: F32) -> NDArray[Any]:
    """The first code of each distinct value."""
    assert layout.table is not None
    return np.array([np.flatnonzero(layout.table == value)[0] for value in values], np.uint8)


def interpolated(values: Tensor, table: Tensor) -> Tensor:
    """Where between the places of a rising table the values lie: numpy.interp of its places."""
    high = torch.searchsorted(table, values.contiguous()).clamp_(1, len(table) - 1)
    lower, upper = table[high - 1], table[high]
    return ((values - lower) / (upper - lower)).clamp_(0, 1) + (high - 1)


def clamp_sum(x: Tensor, start: Tensor, allowed: tuple[int, int]) -> None:
    """Bring x back to where start + x is allowed."""
    start = start.float()
    torch.maximum(x, allowed[0] - start, out=x)
    torch.minimum(x, allowed[1] - start, out=x)


def by_group(values: Tensor, step: Tensor, low: Tensor | None, group: int, columns: int) -> Tensor:
    """step·value - low, (rows, columns); the last group may be cut short, and steps for padding may follow."""
    rows = len(values)
    groups = -(-columns // group)
    if groups * group != columns:
        values = torch.nn.functional.pad(values, (0, groups * group - columns))
    w = values.view(rows, groups, group) * step[:, :groups]
    if low is not None:
        w = w - low[:, :groups]
    return w.reshape(rows, -1)[:, :columns]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, start: Tensor, table: Tensor) -> Tensor:
        low = (start + offset).floor().clamp_(0, len(table) - 2).long()
        ctx.save_for_backward(table[low + 1] - table[low])
        return table[(start + offset.round()).clamp_(0, len(table) - 1).long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None
