"""Invertible changes a tensor undergoes between Hugging Face and GGUF, applied to a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """A change of whole rows: ``apply`` and ``invert`` take and return arrays of shape (rows, columns).

    ``rows`` is how many neighbouring rows travel together: chunks begin and end at its multiples. A transform
    that ``moves`` only reorders rows, so it also applies to rows of packed bytes; any other needs float32.
    """

    name: str
    apply: Callable[[Rows], Rows]
    invert: Callable[[Rows], Rows]
    rows: int = 1
    moves: bool = True


def _same(rows: Rows) -> Rows:
    return rows


IDENTITY = Transform("", _same, _same)


def _negative_exp(x: Rows) -> Rows:
    # float64 inside, so that the float32 result is the correctly rounded one on every machine.
    return (-np.exp(x.astype(np.float64))).astype(np.float32)


def _log_of_negative(x: Rows) -> Rows:
    return np.log(-x.astype(np.float64)).astype(np.float32)


# A = -exp(A_log): Gu and Dao 2023, section 3.6; llama.cpp stores A.
NEGATIVE_EXP = Transform("-exp", _negative_exp, _log_of_negative, moves=False)


def interleave_rotary(head_dim: int, rotary_dim: int) -> Transform:
    """Bring the row pairs (i, i + rotary_dim/2) of each head together, as ggml's NORM rotation expects.

    transformers rotates row i of a head with row i + rotary_dim/2 (``rotate_half``); ggml_rope NORM rotates rows
    2i and 2i + 1. Rows from ``rotary_dim`` on are not rotated and stay where they are: moving them too is
    llama.cpp's converter's fault with partial rotary embeddings.
    """
    forward = interleaved_order(head_dim, rotary_dim)
    backward = np.argsort(forward)
    return Transform(
        f"rotary {rotary_dim}/{head_dim}",
        lambda rows: _per_head(rows, forward),
        lambda rows: _per_head(rows, backward),
        rows=head_dim,
    )


def interleaved_order(head_dim: int, rotary_dim: int) -> NDArray[np.intp]:
    """Source row of each row of a head, shape (head_dim,)."""
    pairs = np.arange(rotary_dim).reshape(2, rotary_dim // 2).T  # (rotary_dim/2, 2)
    return np.concatenate([pairs.ravel(), np.arange(rotary_dim, head_dim)])


def _per_head(rows: Rows, order: NDArray[np.intp]) -> Rows:
    heads = rows.reshape(-1, len(order), rows.shape[-1])  # (heads, head_dim, columns)
    return heads[:, order].reshape(rows.shape)
