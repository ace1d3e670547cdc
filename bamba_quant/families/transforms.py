"""Invertible changes a tensor undergoes between Hugging Face and GGUF, applied to a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs import format_named
from bamba_quant.codecs.base import F32
from bamba_quant.codecs.floats import to_float32

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

    def inverse(self) -> Transform:
        """The transform that undoes this one."""
        return Transform(
            f"inverse of {self.name}" if self.name else "", self.invert, self.apply, self.rows, self.moves
        )


def _same(rows: Rows) -> Rows:
    return rows


IDENTITY = Transform("", _same, _same)


def _negative_exp(x: Rows) -> Rows:
    # float64 inside, so that the float32 result is the correctly rounded one on every machine.
    return (-np.exp(x.astype(np.float64))).astype(np.float32)


def log_of_negative(decay: F32) -> F32:
    """A_log of a whole tensor A = -exp(A_log), float32 of one shape: the values of the checkpoint, where A tells.

    Where 16-bit values make every A to the last bit or the one before (other tools compute exp in float32), they
    are what the checkpoint held: by chance that happens to one float32 in thousands. Else each value is the float32
    that makes A exactly, if one does within two steps of the logarithm, and the nearest if not. An A_log whose own
    steps are finer than what is left of them in A (bf16 below 2^-16, f16 below 2^-13) comes back as a value of that A.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.log(-decay.astype(np.float64))
    nearest = exact.astype(np.float32)
    for name in ("bf16", "f16"):
        narrow = rounded(nearest, name)
        if np.all(np.abs(_negative_exp(narrow) - decay) <= np.spacing(np.abs(decay))):
            return narrow
    best = nearest.copy()
    found = _negative_exp(best) == decay
    for direction in (-np.inf, np.inf):
        stepped = nearest
        for _ in range(2):
            stepped = np.nextafter(stepped, np.float32(direction))
            hit = ~found & (_negative_exp(stepped) == decay)
            best[hit] = stepped[hit]
            found |= hit
    return best


def rounded(values: NDArray[Any], name: str) -> F32:
    """The nearest values that the plain format ``name`` holds, as float32."""
    number_format = format_named(name)
    narrow = number_format.quantize(np.ascontiguousarray(values, dtype=np.float32), None)
    return to_float32(narrow.view(number_format.dtype)).reshape(values.shape)


# A = -exp(A_log): Gu and Dao 2023, section 3.6; llama.cpp stores A.
NEGATIVE_EXP = Transform("-exp", _negative_exp, log_of_negative, moves=False)


def power_of_two(exponent: int) -> Transform:
    """Multiply by 2^``exponent``, which loses nothing within a float's range."""
    if exponent == 0:
        return IDENTITY
    factor = np.float32(2.0**exponent)
    return Transform(f"× 2^{exponent}", lambda x: x * factor, lambda x: x / factor, moves=False)


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
