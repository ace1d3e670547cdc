"""Chooses scale, zero and integers of each group; the numpy version, which defines the bytes.

Groups lie along the trailing axis here: ``x`` has shape (n, groups), sums run serially over the leading axis, and
scales are bfloat16 numbers from the first trial on, so that what is searched is what a loader multiplies by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import extremes, nearest_clipped, quiet, serial_sum
from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.floats import to_bfloat16, to_float32
from bamba_quant.codecs.integers.grid import Groups, IntegerGrid, check_columns
from bamba_quant.errors import FormatError

Fit = Callable[[IntegerGrid, F32, F32], tuple[F32, F32]]

# The scale instead of 0, as compressed-tensors chooses it: ``torch.finfo(torch.bfloat16).eps``.
EPSILON = np.float32(2.0**-7)
# The least fraction of a group's range that the searches try, by bits: clipping pays at 4 bits and hardly at 8.
_LEAST_FRACTION = {4: 0.75, 8: 0.95}
_ONE_SIDED = (0.75, 0.55)  # for outliers on one side alone
TOGETHER = 4  # both lists of a grid's trials are multiples of it, for kernels that take so many at a time


@quiet
def quantize(grid: IntegerGrid, method: str, x: F32, importance: F32 | None = None) -> Groups:
    """Rows x (rows, columns) float32, finite, by the method of that name; importance (columns,) weighs errors.

    Raises ``FormatError`` for columns that groups do not fill and for an unknown method.
    """
    fit = method_named(method)
    check_columns(grid, x.shape[1])
    w = np.ones(x.shape[1], np.float32) if importance is None else importance
    groups = np.ascontiguousarray(x.reshape(-1, grid.group).T)  # (n, groups)
    weights = np.ascontiguousarray(np.broadcast_to(w, x.shape).reshape(-1, grid.group).T)
    scale, zero = fit(grid, groups, weights)
    codes = grid.codes(groups, scale, zero).astype(np.int8)
    return Groups(
        np.ascontiguousarray(codes.T).reshape(x.shape), scale.reshape(len(x), -1), zero.reshape(len(x), -1)
    )


def trials_of(grid: IntegerGrid) -> tuple[F32, F32]:
    """(n, 2): fractions of the range below and above 0 to try first, and what to add to the best of them then.

    A symmetric range has one fraction, twice. Moving a range by part of a step matters where its zero is a float.
    """
    step = 2 / (grid.high - grid.low)  # of the integers, in fractions of a range with 0 in its middle
    fractions = np.linspace(1, _LEAST_FRACTION[grid.bits], 4 if grid.zero == "float" else 8)
    apart = fractions[0] - fractions[1]
    first, narrower, moved = fractions[:, None], np.array(((1, 1),)), np.array(((1, -1),))
    if grid.zero == "none":
        near = apart * np.array(((-0.5,), (-0.25,), (0.25,), (0.5,)))
        return _float32(first * narrower), _float32(near * narrower)
    shifts, by_scale, by_step = (
        ((0,), 0.4, 1 / 3) if grid.zero == "integer" else ((0, -1 / 3, 1 / 3), 0.3, 0.1)
    )
    both_sides = [first * narrower + shift * step * moved for shift in shifts]
    one_side = [(1, cut) for cut in _ONE_SIDED] + [(cut, 1) for cut in _ONE_SIDED]
    near = [sign * by for by in (by_scale * apart * narrower, by_step * step * moved) for sign in (-1, 1)]
    return _float32(np.concatenate((*both_sides, one_side))), _float32(np.concatenate(near))


def _float32(v: Any) -> F32:
    return np.asarray(v, np.float32)


def bfloat16(v: F32) -> F32:
    """The nearest bfloat16, as float32."""
    return to_float32(to_bfloat16(v))


def method_named(name: str) -> Fit:
    """The method of that name. Raises ``FormatError`` listing the names there are."""
    if name not in METHODS:
        raise FormatError("unknown method", found=repr(name), expected="one of " + ", ".join(METHODS))
    return METHODS[name]


def magnitude(x: F32) -> F32:
    """The greatest magnitude along the leading axis."""
    low, high = extremes(x)
    greatest: F32 = np.maximum(-low, high)
    return greatest


def span(grid: IntegerGrid, low: F32, high: F32) -> tuple[F32, F32]:
    """Scale and zero that spread the integers over [low, high], which holds 0 unless the zero is a float."""
    steps = np.float32(grid.high - grid.low)
    exact = (high - low) / steps
    scale = usable(bfloat16(exact))
    if grid.zero == "float":
        return scale, bfloat16(low - scale * np.float32(grid.low))
    # Against the scale before rounding, as compressed-tensors has it.
    zero = np.clip(np.float32(grid.low) - low / exact, np.float32(grid.low), np.float32(grid.high))
    return scale, np.where(exact == 0, np.float32(0), nearest_clipped(zero, grid.low, grid.high))


def usable(scale: F32) -> F32:
    return np.where(scale == 0, EPSILON, scale)


def ends(grid: IntegerGrid, x: F32) -> tuple[F32, F32]:
    """Least and greatest of each group; an integer zero represents 0, so 0 lies between them."""
    low, high = extremes(x)
    if grid.zero == "integer":
        return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    return low, high


def round_to_nearest(grid: IntegerGrid, x: F32, weights: F32) -> tuple[F32, F32]:
    """compressed-tensors' min-max (quantization/utils/helpers.py, ``calculate_qparams``), torchao's for a float zero.

    Symmetric: the greatest magnitude over 7.5 (127.5), so that the greatest positive number is clipped by half a
    step. Otherwise the range over 15 (255).
    """
    if grid.zero == "none":
        scale = bfloat16(magnitude(x) / (np.float32(grid.high - grid.low) / np.float32(2)))
        return usable(scale), np.zeros(x.shape[1:], np.float32)
    return span(grid, *ends(grid, x))


def least_squares(grid: IntegerGrid, x: F32, weights: F32) -> tuple[F32, F32]:
    """Of ``round_to_nearest`` and clipped ranges the one of least weighted squared error.

    A few fractions of the range come first, then some near the best of them. Symmetric scales stay positive: every
    kernel expects that.
    """
    best = _Best(grid, x, weights)
    low, high = ends(grid, x)
    _search(best, low, high, magnitude(x) / np.float32(-grid.low))
    return best.scale, best.zero


def half_quadratic(grid: IntegerGrid, x: F32, weights: F32) -> tuple[F32, F32]:
    """The same search, then scale (and a float zero) refitted by least squares to its integers, and these to them.

    A turn of the alternation of half-quadratic quantization (Badri and Shaji 2023) in the squared norm; more turns
    gained 0.3 % of the error at most. A symmetric scale has the sign with which -8 encodes the greatest magnitude, so
    it may be negative.
    """
    best = _Best(grid, x, weights)
    low, high = ends(grid, x)
    _search(best, low, high, _float32(np.where(-low > high, low, high) / np.float32(grid.low)))
    best.consider(*_refit(grid, x, weights, best))
    return best.scale, best.zero


METHODS: dict[str, Fit] = {"rtn": round_to_nearest, "mse": least_squares, "hqq": half_quadratic}


class _Best:
    """The parameters of least error so far, group by group, at first those of ``round_to_nearest``."""

    def __init__(self, grid: IntegerGrid, x: F32, weights: F32) -> None:
        self.grid, self._x, self._weights = grid, x, weights
        self.scale, self.zero = round_to_nearest(grid, x, weights)
        self._per_scale = np.float32(1) / self.scale  # errors are relative to it, so that no square overflows
        self.error = np.full_like(self.scale, np.inf)
        self.consider(self.scale, self.zero)

    def integers(self, scale: F32, zero: F32) -> tuple[F32, F32]:
        """The integers, less an integer zero, and the remainders of the quotients, in steps; (n, groups) each.

        Quotients are by the reciprocal, which is faster and differs by an ulp from ``IntegerGrid.codes``. They
        are exact in float64: a fused multiply-add rounds the rest once, as here.
        """
        x = self._x - zero if self.grid.zero == "float" else self._x
        quotient = x.astype(np.float64) * (np.float32(1) / scale)
        shift = zero if self.grid.zero == "integer" else np.float32(0)
        q = np.rint(np.clip(quotient, self.grid.low - shift, self.grid.high - shift))
        return q.astype(np.float32), (quotient - q).astype(np.float32)

    def consider(self, scale: F32, zero: F32) -> NDArray[np.bool_]:
        """Keep these parameters where they are better; returns a mask of these groups."""
        error = self._of(scale, zero)
        usable = scale != 0 if self.grid.zero == "none" else scale > 0
        better: NDArray[np.bool_] = (error < self.error) & usable
        self.error = np.where(better, error, self.error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)
        return better

    def _of(self, scale: F32, zero: F32) -> F32:
        _, rest = self.integers(scale, zero)
        relative = scale * self._per_scale
        error: F32 = serial_sum(self._weights * (rest * rest)) * (relative * relative)
        return error


def _search(best: _Best, low: F32, high: F32, widest: F32) -> None:
    """Try ranges: fractions of [low, high], or symmetric ones, fractions of the scale ``widest``."""
    grid = best.grid
    first, near = trials_of(grid)
    below = above = np.ones_like(low)
    start_below = start_above = np.zeros_like(low)
    for trials in (first, near):
        for some_below, some_above in trials:
            trial_below, trial_above = start_below + some_below, start_above + some_above
            if grid.zero == "none":
                scale, zero = bfloat16(widest * trial_below), best.zero
            else:
                scale, zero = span(grid, low * trial_below, high * trial_above)
            better = best.consider(scale, zero)
            below, above = np.where(better, trial_below, below), np.where(better, trial_above, above)
        start_below, start_above = below, above


def _refit(grid: IntegerGrid, x: F32, weights: F32, best: _Best) -> tuple[F32, F32]:
    """The scale (and float zero) of least squared error for the integers that the best ones so far give.

    A scale of 0, which is never taken, where no error was finite.
    """
    q, _ = best.integers(best.scale, best.zero)
    wq = weights * q
    sum_qq, sum_qx = serial_sum(wq * q), serial_sum(wq * x)
    known = best.error < np.inf
    if grid.zero != "float":
        return np.where(known, bfloat16(sum_qx / sum_qq), np.float32(0)), best.zero
    sum_w, sum_q, sum_x = serial_sum(weights), serial_sum(wq), serial_sum(weights * x)
    slope: NDArray[Any] = (sum_w * sum_qx - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q)
    scale = bfloat16(slope)
    start: NDArray[Any] = (sum_x - scale * sum_q) / sum_w
    return np.where(known, scale, np.float32(0)), bfloat16(start)
