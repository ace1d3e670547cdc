"""Groups of a row as integers with one scale each: how scale, zero and integers are chosen; numpy, the definition.

Groups lie along the trailing axis here: ``x`` has shape (n, groups), sums run serially over the leading axis, and
scales are bfloat16 numbers from the first trial on, so that what is searched is what a loader multiplies by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bamba_quant.errors import FormatError
from bamba_quant.formats.arithmetic import extremes, nearest_clipped, quiet, serial_sum
from bamba_quant.formats.base import F32, U8
from bamba_quant.formats.floats import to_bfloat16, to_float32

Zero = Literal["none", "integer", "float"]
Fit = Callable[["Grid", F32, F32], tuple[F32, F32]]

# What a scale becomes that would be 0: compressed-tensors' choice, ``torch.finfo(torch.bfloat16).eps``.
EPSILON = np.float32(2.0**-7)
# Fractions of a group's range that the searches try, by bits: clipping pays at 4 bits and hardly at 8.
_LEAST_FRACTION = {4: 0.65, 8: 0.95}
SYMMETRIC_TRIALS, RANGE_TRIALS, START_TRIALS, REFITS = 16, 8, 6, 3


@dataclass(frozen=True)
class Grid:
    """The numbers a group can hold: scale·q, scale·(q - zero) for an integer zero, scale·q + zero for a float one.

    ``bits`` is 4 or 8, q goes from -2^(bits-1) to 2^(bits-1) - 1, as does an integer zero; a float zero is a
    bfloat16. ``group`` is the number of neighbouring columns that share a scale.
    """

    bits: int
    zero: Zero
    group: int

    def __post_init__(self) -> None:
        if self.bits not in _LEAST_FRACTION or self.zero not in get_args(Zero) or self.group % 32:
            raise FormatError(
                "there are no integers of this kind",
                found=f"{self.bits} bits, zero {self.zero!r}, groups of {self.group}",
                expected=f"4 or 8 bits, zero one of {', '.join(get_args(Zero))}, groups of a multiple of 32",
            )

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        return (1 << self.bits - 1) - 1

    def fractions(self, count: int) -> F32:
        """``count`` fractions of the range, the whole range last."""
        return np.linspace(_LEAST_FRACTION[self.bits], 1, count, dtype=np.float32)

    def codes(self, x: F32, scale: F32, zero: F32) -> F32:
        """The nearest integers (n, groups), as float32, each quotient rounded as compressed-tensors rounds it."""
        if self.zero == "float":
            return nearest_clipped((x - zero) / scale, self.low, self.high)
        if self.zero == "integer":
            return nearest_clipped(x / scale + zero, self.low, self.high)
        return nearest_clipped(x / scale, self.low, self.high)

    def values(self, q: F32, scale: F32, zero: F32) -> F32:
        """What integers stand for, float32."""
        if self.zero == "float":
            return scale * q + zero
        if self.zero == "integer":
            return scale * (q - zero)
        return scale * q


@dataclass(frozen=True)
class Groups:
    """Rows quantized: ``codes`` int8 (rows, columns); ``scale`` and ``zero`` float32 (rows, columns / group).

    Scales, and zeros of kind "float", are bfloat16 numbers; zeros of kind "integer" are whole.
    """

    codes: NDArray[np.int8]
    scale: F32
    zero: F32


def bfloat16(v: F32) -> F32:
    """The nearest bfloat16, as float32."""
    return to_float32(to_bfloat16(v))


@quiet
def quantize(grid: Grid, method: str, x: F32, importance: F32 | None = None) -> Groups:
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


def dequantize(grid: Grid, groups: Groups) -> F32:
    """What ``groups`` stand for, float32 (rows, columns), before any rounding a loader adds."""
    rows, columns = groups.codes.shape
    q = groups.codes.reshape(rows, -1, grid.group).astype(np.float32)
    return grid.values(q, groups.scale[..., None], groups.zero[..., None]).reshape(rows, columns)


def check_columns(grid: Grid, columns: int) -> None:
    """Raise ``FormatError`` when groups do not fill a row."""
    if columns % grid.group:
        raise FormatError(
            "a row does not divide into groups",
            found=f"{columns} columns",
            expected=f"a multiple of {grid.group}",
        )


def method_named(name: str) -> Fit:
    """The method of that name. Raises ``FormatError`` listing the names there are."""
    if name not in METHODS:
        raise FormatError(
            "no such method chooses integers", found=repr(name), expected="one of " + ", ".join(METHODS)
        )
    return METHODS[name]


def magnitude(x: F32) -> F32:
    """The greatest magnitude along the leading axis."""
    low, high = extremes(x)
    greatest: F32 = np.maximum(-low, high)
    return greatest


def span(grid: Grid, low: F32, high: F32) -> tuple[F32, F32]:
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


def ends(grid: Grid, x: F32) -> tuple[F32, F32]:
    """Least and greatest of each group; an integer zero stands for 0, so 0 lies between them."""
    low, high = extremes(x)
    if grid.zero == "integer":
        return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    return low, high


def round_to_nearest(grid: Grid, x: F32, weights: F32) -> tuple[F32, F32]:
    """compressed-tensors' min-max (quantization/utils/helpers.py, ``calculate_qparams``), torchao's for a float zero.

    Symmetric: the greatest magnitude over 7.5 (127.5), so that the greatest positive number is clipped by half a
    step. Otherwise the range over 15 (255).
    """
    if grid.zero == "none":
        scale = bfloat16(magnitude(x) / (np.float32(grid.high - grid.low) / np.float32(2)))
        return usable(scale), np.zeros(x.shape[1:], np.float32)
    return span(grid, *ends(grid, x))


def least_squares(grid: Grid, x: F32, weights: F32) -> tuple[F32, F32]:
    """Of ``round_to_nearest`` and a grid of clipped ranges the one of least weighted squared error.

    Symmetric scales stay positive: every kernel expects that.
    """
    return _search(grid, x, weights, *round_to_nearest(grid, x, weights), half_quadratic=False)


def half_quadratic(grid: Grid, x: F32, weights: F32) -> tuple[F32, F32]:
    """A coarser search of ranges, then integers and scale (and a float zero) refitted in turns by least squares.

    The alternation of half-quadratic quantization (Badri and Shaji 2023) in the squared norm. A symmetric scale may
    come out negative, so that -8 serves the greatest magnitude whatever its sign.
    """
    return _search(grid, x, weights, *round_to_nearest(grid, x, weights), half_quadratic=True)


METHODS: dict[str, Fit] = {"rtn": round_to_nearest, "mse": least_squares, "hqq": half_quadratic}


class _Best:
    """The parameters of least error so far, group by group."""

    def __init__(self, grid: Grid, x: F32, weights: F32, scale: F32, zero: F32) -> None:
        self._grid, self._x, self._weights = grid, x, weights
        self.scale, self.zero = scale, zero
        self._error = self._of(self.integers(scale, zero), scale, zero)

    def integers(self, scale: F32, zero: F32) -> F32:
        """By the reciprocal, which differs from ``Grid.codes`` by an ulp of the quotient and is faster."""
        inverse = np.float32(1) / scale
        if self._grid.zero == "float":
            quotient = (self._x - zero) * inverse
        elif self._grid.zero == "integer":
            quotient = self._x * inverse + zero
        else:
            quotient = self._x * inverse
        return nearest_clipped(quotient, self._grid.low, self._grid.high)

    def consider(self, scale: F32, zero: F32) -> None:
        error = self._of(self.integers(scale, zero), scale, zero)
        usable = scale != 0 if self._grid.zero == "none" else scale > 0
        better = (error < self._error) & usable
        self._error = np.where(better, error, self._error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def _of(self, q: F32, scale: F32, zero: F32) -> F32:
        difference = self._grid.values(q, scale, zero) - self._x
        return serial_sum(self._weights * (difference * difference))


def _search(grid: Grid, x: F32, weights: F32, scale: F32, zero: F32, half_quadratic: bool) -> tuple[F32, F32]:
    best = _Best(grid, x, weights, scale, zero)
    if grid.zero == "none":
        widest = magnitude(x) / np.float32(-grid.low)
        for fraction in grid.fractions(SYMMETRIC_TRIALS):
            trial = bfloat16(widest * fraction)
            best.consider(trial, zero)
            if half_quadratic:
                best.consider(-trial, zero)
    else:
        low, high = ends(grid, x)
        fractions = grid.fractions(START_TRIALS if half_quadratic else RANGE_TRIALS)
        for below in fractions:
            for above in fractions:
                best.consider(*span(grid, low * below, high * above))
    for _ in range(REFITS if half_quadratic else 0):
        best.consider(*_refit(grid, x, weights, best))
    return best.scale, best.zero


def _refit(grid: Grid, x: F32, weights: F32, best: _Best) -> tuple[F32, F32]:
    """The scale (and float zero) of least squared error for the integers that the best ones so far give."""
    q = best.integers(best.scale, best.zero)
    if grid.zero == "integer":
        q = q - best.zero
    wq = weights * q
    sum_qq, sum_qx = serial_sum(wq * q), serial_sum(wq * x)
    if grid.zero != "float":
        return bfloat16(sum_qx / sum_qq), best.zero
    sum_w, sum_q, sum_x = serial_sum(weights), serial_sum(wq), serial_sum(weights * x)
    slope: NDArray[Any] = (sum_w * sum_qx - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q)
    scale = bfloat16(slope)
    start: NDArray[Any] = (sum_x - scale * sum_q) / sum_w
    return scale, bfloat16(start)


def pack(codes: NDArray[np.int8], bits: int, offset: int) -> U8:
    """Integers plus ``offset`` modulo 2^bits, (rows, n) to (rows, n·bits/8): the first nibble is the low one."""
    unsigned = (codes.view(np.uint8) + np.uint8(offset)) & np.uint8((1 << bits) - 1)
    if bits == 8:
        return unsigned
    packed: U8 = unsigned[:, ::2] | unsigned[:, 1::2] << np.uint8(4)
    return packed


def unpack(packed: U8, bits: int, offset: int) -> NDArray[np.int8]:
    """The inverse of ``pack`` for integers of [-2^(bits-1), 2^(bits-1))."""
    unsigned: Any = packed
    if bits == 4:
        unsigned = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), 2 * packed.shape[1])
    # Shifting the offset's bits to the top and back extends the sign.
    top = 8 - bits
    shifted = (unsigned - np.uint8(offset)) << top
    codes: NDArray[np.int8] = shifted.view(np.int8) >> np.int8(top)
    return codes
