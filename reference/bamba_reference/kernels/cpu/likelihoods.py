"""Normalizers, divergences and likeliest tokens of rows of float32 logits, in one or two passes over each row.

Sums are float64, a vector of them at a time, so their last bits depend on the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import exp64
from bamba_reference.kernels.cpu.launch import (
    DOUBLES,
    FLOATS,
    SIZE,
    SIZES,
    Doubles,
    Floats,
    Integers,
    compiled,
    inlined,
    memory,
    share,
    supported,
)

_DOUBLE = types.float64


def supports(*logits: Tensor) -> bool:
    """Whether the kernels can read these."""
    return supported(*logits) and all(rows.is_contiguous() for rows in logits)


def normalizers(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """ln Σ exp of each row of logits (T, V), float64 (T,), and its ``top`` greatest entries' numbers (T, top).

    The greatest is first, and of equal ones the one with the least number.
    """
    T, V = logits.shape
    normalizer, found = np.empty(T), np.empty(T * top, np.int64)
    share(_normalizers, memory(logits), V, top, normalizer, found, count=T)
    return torch.from_numpy(normalizer), torch.from_numpy(found).view(T, top)


def divergences(
    base: Tensor, normalizer: Tensor, logits: Tensor, cut: float, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ p (ln p - ln q), float64 (T,), of a base's logits (T, V) with its ``normalizers`` and of a candidate's logits.

    p are the base's probabilities, q the candidate's; the sum is over entries with ln p above ``cut``. Then the
    candidate's own normalizers and greatest entries, as ``normalizers`` gives them.
    """
    T, V = logits.shape
    kld, ours, found = np.empty(T), np.empty(T), np.empty(T * top, np.int64)
    share(
        _divergences,
        memory(base), normalizer.contiguous().view(-1).numpy(), memory(logits), V, top, cut, kld, ours, found,
        count=T,
    )  # fmt: skip
    return torch.from_numpy(kld), torch.from_numpy(ours), torch.from_numpy(found).view(T, top)


@inlined
def _maximum(row: Floats) -> Any:
    greatest = np.float32(-np.inf)
    for i in range(len(row)):
        greatest = max(greatest, row[i])
    return np.float64(greatest)


@inlined
def _greatest(row: Floats, top: int, found: Integers) -> None:
    """The numbers of the ``top`` greatest entries, by insertion: almost no entry is among them."""
    held = 0
    for i in range(len(row)):
        if held == top and not row[i] > row[found[top - 1]]:
            continue
        place = held if held < top else top - 1
        held = min(top, held + 1)
        while place > 0 and row[i] > row[found[place - 1]]:
            found[place] = found[place - 1]
            place -= 1
        found[place] = i


@compiled(FLOATS, SIZE, SIZE, DOUBLES, SIZES, SIZE, SIZE, sums=True)
def _normalizers(
    logits: Floats, V: int, top: int, normalizer: Doubles, found: Integers, start: int, stop: int
) -> None:
    for t in range(start, stop):
        row = logits[t * V : (t + 1) * V]
        total, most = 0.0, _maximum(row)
        for i in range(V):
            total += exp64(np.float64(row[i]) - most)
        normalizer[t] = most + np.log(total)
        _greatest(row, top, found[t * top : (t + 1) * top])


@compiled(FLOATS, DOUBLES, FLOATS, SIZE, SIZE, _DOUBLE, DOUBLES, DOUBLES, SIZES, SIZE, SIZE, sums=True)
def _divergences(
    base: Floats, base_normalizer: Doubles, logits: Floats, V: int, top: int, cut: float,
    kld: Doubles, normalizer: Doubles, found: Integers, start: int, stop: int,
) -> None:  # fmt: skip
    for t in range(start, stop):
        theirs, ours = base[t * V : (t + 1) * V], logits[t * V : (t + 1) * V]
        total, most = 0.0, _maximum(ours)
        for i in range(V):
            total += exp64(np.float64(ours[i]) - most)
        normalizer[t] = own = most + np.log(total)
        lost, of_base = 0.0, base_normalizer[t]
        for i in range(V):
            log_p = np.float64(theirs[i]) - of_base
            term = exp64(log_p) * (log_p - (np.float64(ours[i]) - own))
            lost += term if log_p > cut else 0.0
        kld[t] = lost
        _greatest(ours, top, found[t * top : (t + 1) * top])
