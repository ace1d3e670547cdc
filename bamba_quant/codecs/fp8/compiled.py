"""The compiled version of ``fp8``: loops over plain arrays that LLVM turns into vectors.

Magnitudes are compared and rounded as the integers their bits are, so no order of float operations is left to
choose but that of the histogram's sums, which is the elements' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.compiled.compilation import compile_kernel, inlined
from bamba_quant.codecs.fp8.scales import BINS, CANDIDATES, energies, losses, of_largest, scale_of_candidate

_ROWS = types.Array(types.float32, 2, "C", readonly=True)
_BITS = types.Array(types.int32, 2, "C", readonly=True)
_WEIGHTS = types.Array(types.float32, 1, "C", readonly=True)
_WHOLE = types.Array(types.int64, 1, "C", readonly=True)
_TABLE = types.Array(types.float64, 2, "C", readonly=True)
_ENERGIES = types.Array(types.float64, 1, "C", readonly=True)
_SCALES = types.Array(types.float32, 2, "C", readonly=True)
_CODES = types.Array(types.uint8, 2, "C")
_COUNTS = types.Array(types.int64, 1, "C")
_LARGEST = types.Array(types.int32, 2, "C")
_FOUND = types.Array(types.int64, 2, "C")
_SIZE = types.int64

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MOST = np.int32(np.float32(448).view(np.int32))
_NORMAL = np.int32(np.float32(2.0**-6).view(np.int32))  # below it codes are 2^-9 apart
# Shifts and masks of 32 bits: a Python number would widen the operation.
_TWENTY, _ONE, _HALF = np.int32(20), np.int32(1), np.int32(0x7FFFF)
_BIAS, _TO_SIGN, _SIGN = np.int32(120 << 3), np.int32(24), np.int32(0x80)
_TOGETHER = 8  # tiles whose errors are summed for each row of the table of losses that is read
_FIXED = np.float32(2.0**14)  # a float this large ends in 2^-9


def encode_tiles(x: F32, importance: F32 | None, tile: tuple[int, int], search: bool) -> tuple[U8, F32]:
    """Codes (rows, columns) and scales (tiles down, tiles across) of ``fp8.tile_scales`` and ``codes``."""
    x = np.require(x, np.float32, ["C", "A"])
    height, width = tile[0], tile[1] or x.shape[1]
    shape = (-(-x.shape[0] // height), -(-x.shape[1] // width))
    largest = np.empty(shape, np.int32)
    compile_kernel(_largest, types.void(_BITS, _SIZE, _SIZE, _LARGEST))(
        x.view(np.int32), height, width, largest
    )
    amax = largest.view(np.float32)
    if search:
        candidates = np.empty(shape, np.int64)
        weights = None if importance is None else np.require(importance, np.float32, ["C", "A"])
        signature = types.void(
            _BITS, types.none if weights is None else _WEIGHTS, _ENERGIES, _TABLE, _SIZE, _SIZE, _FOUND
        )
        compile_kernel(_search, signature)(
            x.view(np.int32), weights, energies()[::BINS].copy(), losses(), height, width, candidates
        )
        scales = scale_of_candidate(candidates, amax)
    else:
        scales = of_largest(amax)
    return _encoded(x, scales, height, width), scales


def encode_scaled(x: F32, scale: F32) -> U8:
    """Codes of a matrix under one scale, of shape (1,)."""
    x = np.require(x, np.float32, ["C", "A"])
    height, width = x.shape
    return _encoded(x, scale.reshape(1, 1), height, width)


def counts(x: F32, weights: Any) -> Any:
    """``fp8.counts``, given the whole numbers that weigh the columns, or None."""
    x = np.require(x, np.float32, ["C", "A"])
    found = np.zeros(256 * BINS + 1, np.int64)
    signature = types.void(_BITS, types.none if weights is None else _WHOLE, _COUNTS)
    compile_kernel(_count, signature)(x.view(np.int32), weights, found)
    found[-1:] = largest_bits(x)
    return found


def largest_bits(x: F32) -> Any:
    """``fp8.largest_bits``."""
    x = np.require(x, np.float32, ["C", "A"])
    largest = np.zeros((1, 1), np.int32)
    if x.size:
        height, width = x.shape
        compile_kernel(_largest, types.void(_BITS, _SIZE, _SIZE, _LARGEST))(
            x.view(np.int32), height, width, largest
        )
    return largest[0].astype(np.int64)


def _encoded(x: F32, scales: F32, height: int, width: int) -> U8:
    codes = np.empty(x.shape, np.uint8)
    compile_kernel(_encode, types.void(_ROWS, _SCALES, _SIZE, _SIZE, _CODES))(x, scales, height, width, codes)
    return codes


def _largest(bits: Any, height: int, width: int, largest: Any) -> None:
    largest[:] = 0
    rows, columns = bits.shape
    for row in range(rows):
        for tile in range(largest.shape[1]):
            most = largest[row // height, tile]
            # A slice's own indices are never negative, which spares a test of each.
            some = bits[row, tile * width : min((tile + 1) * width, columns)]
            for i in range(some.size):
                magnitude = some[i] & _MAGNITUDE
                most = magnitude if magnitude > most else most
            largest[row // height, tile] = most


@inlined
def _position(bits: Any) -> Any:
    magnitude = np.uint32(bits & _MAGNITUDE)
    return (magnitude + np.uint32(0x3FFF) + ((magnitude >> np.uint32(15)) & np.uint32(1))) >> np.uint32(15)


def _search(bits: Any, weights: Any, squares: Any, losses: Any, height: int, width: int, found: Any) -> None:
    rows, columns = bits.shape
    histogram, error = np.empty((_TOGETHER, BINS)), np.empty((_TOGETHER, CANDIDATES))
    across_all = found.shape[1]
    tiles = found.shape[0] * across_all
    for first in range(0, tiles, _TOGETHER):
        count = min(_TOGETHER, tiles - first)
        histogram[:] = 0
        error[:] = 0
        for t in range(count):
            down, across = (first + t) // across_all, (first + t) % across_all
            for row in range(down * height, min((down + 1) * height, rows)):
                some = bits[row, across * width : min((across + 1) * width, columns)]
                for i in range(some.size):
                    position = _position(some[i])
                    energy = squares[position >> np.uint32(8)]
                    if weights is not None:
                        energy *= weights[across * width + i]
                    histogram[t, position & np.uint32(255)] += energy
        for i in range(0, BINS, 4):  # four bins a pass, added in their order
            for t in range(count):
                a, b, c, d = histogram[t, i], histogram[t, i + 1], histogram[t, i + 2], histogram[t, i + 3]
                for j in range(CANDIDATES):
                    some_error = error[t, j] + a * losses[i, j] + b * losses[i + 1, j]
                    error[t, j] = some_error + c * losses[i + 2, j] + d * losses[i + 3, j]
        for t in range(count):
            found[(first + t) // across_all, (first + t) % across_all] = error[t].argmin()


def _count(bits: Any, weights: Any, found: Any) -> None:
    for row in range(bits.shape[0]):
        for column in range(bits.shape[1]):
            position = _position(bits[row, column])
            if weights is None:
                found[position] += 1
            else:
                found[position] += weights[column]


def _encode(x: Any, scales: Any, height: int, width: int, codes: Any) -> None:
    rows, columns = x.shape
    quotient = np.empty(min(width, columns), np.float32)
    quotient_bits, shifted = quotient.view(np.int32), np.empty(quotient.size, np.float32)
    shifted_bits = shifted.view(np.int32)
    fixed = np.int32(0x46800000)  # of _FIXED
    for row in range(rows):
        for tile in range(scales.shape[1]):
            scale = scales[row // height, tile]
            first = tile * width
            count = min(width, columns - first)
            some, written = x[row, first : first + count], codes[row, first : first + count]
            for i in range(some.size):
                quotient[i] = some[i] / scale
                shifted[i] = abs(quotient[i]) + _FIXED
            for i in range(some.size):
                a = quotient_bits[i] & _MAGNITUDE
                a = a if a < _MOST else _MOST
                # Adding half a step less one, plus the last kept bit, carries exactly where nearest-even rounds up.
                normal = ((a + _HALF + ((a >> _TWENTY) & _ONE)) >> _TWENTY) - _BIAS
                code = normal if a >= _NORMAL else shifted_bits[i] - fixed
                written[i] = np.uint8(code | ((quotient_bits[i] >> _TO_SIGN) & _SIGN))
