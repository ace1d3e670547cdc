"""Invertible changes a tensor undergoes between Hugging Face and GGUF, applied to a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.floats import to_float32

Rows = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Transform:
    """An invertible change of a matrix (rows, columns), applied to neighbouring rows of it at a time.

    ``apply`` reorders the rows within each ``unit`` of them, reorders the columns, multiplies by the factors and then
    applies ``function``; each part may be missing. ``row_order`` (unit,) and ``column_order`` (columns,) hold the
    source index of each row and column. ``row_factors`` float32 belong to the rows of the result by their number in
    the whole tensor, repeated to its end, so that one factor scales all; ``column_factors`` (columns,) float32 belong
    to the columns of the result. ``function`` is a pair of elementwise functions on float32, the second the inverse
    of the first.
    """

    name: str
    unit: int = 1
    row_order: NDArray[np.intp] | None = None
    column_order: NDArray[np.intp] | None = None
    row_factors: F32 | None = None
    column_factors: F32 | None = None
    function: tuple[Callable[[Rows], Rows], Callable[[Rows], Rows]] | None = None
    inverted: bool = False

    @property
    def moves_rows_only(self) -> bool:
        """Whether values stay in their rows unchanged, so that rows of packed bytes can be transformed too."""
        others = (self.column_order, self.row_factors, self.column_factors, self.function)
        return all(part is None for part in others)

    @property
    def scales_rows_at_most(self) -> bool:
        """Whether values stay in their rows, times the row's factor."""
        return self.column_order is None and self.column_factors is None and self.function is None

    def scaled_moves(self, first_row: int, count: int) -> tuple[Transform, F32 | None]:
        """Of a transform that ``scales_rows_at_most``: its moves of rows, and what its inverse divides rows by after
        undoing these, (count, 1); None where it scales none.
        """
        moves = replace(self, row_factors=None)
        scales = self.row_factors is not None
        return moves, moves.invert(self._row_factors(first_row, count), first_row) if scales else None

    @property
    def depends_on_row(self) -> bool:
        """Whether rows are treated differently: a vector must then be given as a column."""
        return self.unit > 1 or self.row_factors is not None

    def apply(self, rows: Rows, first_row: int) -> Rows:
        """``rows`` (n, columns) transformed, same shape; ``first_row`` is the number of the first in the tensor.

        Both n and ``first_row`` must be multiples of ``unit``. All but moves of rows need float32.
        """
        return self._backward(rows, first_row) if self.inverted else self._forward(rows, first_row)

    def invert(self, rows: Rows, first_row: int) -> Rows:
        """The inverse of ``apply``."""
        return self._forward(rows, first_row) if self.inverted else self._backward(rows, first_row)

    def inverse(self) -> Transform:
        """The transform that undoes this one."""
        name = f"inverse of {self.name}" if self.name else ""
        return replace(self, name=name, inverted=not self.inverted)

    def _forward(self, rows: Rows, first_row: int) -> Rows:
        rows = self._reordered(rows, self.row_order)
        if self.column_order is not None:
            rows = rows[:, self.column_order]
        if self.row_factors is not None:
            rows = rows * self._row_factors(first_row, len(rows))
        if self.column_factors is not None:
            rows = rows * self.column_factors
        return rows if self.function is None else self.function[0](rows)

    def _backward(self, rows: Rows, first_row: int) -> Rows:
        rows = rows if self.function is None else self.function[1](rows)
        if self.column_factors is not None:
            rows = rows / self.column_factors
        if self.row_factors is not None:
            rows = rows / self._row_factors(first_row, len(rows))
        if self.column_order is not None:
            rows = rows[:, np.argsort(self.column_order)]
        return self._reordered(rows, None if self.row_order is None else np.argsort(self.row_order))

    def _reordered(self, rows: Rows, order: NDArray[np.intp] | None) -> Rows:
        if order is None:
            return rows
        units = rows.reshape(-1, self.unit, rows.shape[-1])
        return units[:, order].reshape(rows.shape)

    def _row_factors(self, first_row: int, count: int) -> F32:
        """(count, 1)."""
        assert self.row_factors is not None
        return self.row_factors.take(np.arange(first_row, first_row + count), mode="wrap")[:, None]


IDENTITY = Transform("")


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
    codec = codec_named(name, BlockCodec)
    narrow = codec.quantize(np.ascontiguousarray(values, dtype=np.float32), None)
    return to_float32(narrow.view(codec.dtype)).reshape(values.shape)


# A = -exp(A_log): Gu and Dao 2023, section 3.6; llama.cpp stores A.
NEGATIVE_EXP = Transform("-exp", function=(_negative_exp, log_of_negative))


def power_of_two(exponent: int) -> Transform:
    """Multiply by 2^``exponent``, which loses nothing within a float's range."""
    return scaled(2.0**exponent, f"× 2^{exponent}")


def scaled(factor: float, name: str = "") -> Transform:
    """Multiply by ``factor`` as float32 has it."""
    if factor == 1:
        return IDENTITY
    return Transform(name or f"× {factor:.6g}", row_factors=np.array([factor], np.float32))


def scaled_sections(name: str, sections: Sequence[tuple[int, float]]) -> Transform:
    """Multiply sections of rows, (number of rows, factor) from the first on: muP's factors of in_proj's outputs."""
    counts, factors = zip(*sections, strict=True)
    if all(factor == 1 for factor in factors):
        return IDENTITY
    return Transform(name, row_factors=np.repeat(np.array(factors, np.float32), counts))


def permuted_rows(name: str, order: NDArray[np.intp]) -> Transform:
    """Reorder the rows within each group of len(``order``); ``order`` holds the source of each row."""
    return Transform(name, unit=len(order), row_order=order)


def interleave_rotary(head_dim: int, rotary_dim: int) -> Transform:
    """Bring the row pairs (i, i + rotary_dim/2) of each head together, as ggml's NORM rotation expects.

    transformers rotates row i of a head with row i + rotary_dim/2 (``rotate_half``); ggml_rope NORM rotates rows
    2i and 2i + 1. Rows from ``rotary_dim`` on are not rotated and stay where they are: moving them too is
    llama.cpp's converter's fault with partial rotary embeddings.
    """
    return permuted_rows(f"rotary {rotary_dim}/{head_dim}", interleaved_order(head_dim, rotary_dim))


def interleaved_order(head_dim: int, rotary_dim: int) -> NDArray[np.intp]:
    """Source row of each row of a head, shape (head_dim,)."""
    pairs = np.arange(rotary_dim).reshape(2, rotary_dim // 2).T  # (rotary_dim/2, 2)
    return np.concatenate([pairs.ravel(), np.arange(rotary_dim, head_dim)])
