"""Scales of e4m3 codes: a group's largest magnitude decides one, or a search of every mantissa a bfloat16 has.

A floating-point code rounds relative to its own magnitude, so a scale's power of two changes nothing until codes
overflow or underflow; its mantissa decides where between two codes each weight falls. A group's squared error under a
mantissa depends on a weight's own mantissa and, as a factor, on its power of two. So one histogram of the group's
mantissas, weighted by squared magnitude, gives the error under all 128 of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32

F64 = NDArray[np.float64]

LARGEST = np.float32(448)  # of e4m3: 1.75 · 2^8
SMALLEST_SCALE = np.float32(2.0**-126)  # below it processors and GPUs may read zero
BINS = 256  # distinguished mantissas: those of bfloat16, and one between each two
CANDIDATES = 128  # mantissas of bfloat16


def as_bfloat16(scales: F32) -> F32:
    """The nearest bfloat16 of each scale, as float32."""
    return scales.astype(ml_dtypes.bfloat16).astype(np.float32)


def usable(scales: F32) -> F32:
    """Scales that can be divided by: 1 where a group is all zeros, and no subnormal number."""
    return np.where(scales > 0, np.maximum(scales, SMALLEST_SCALE), np.float32(1))


def of_largest(amax: F32) -> F32:
    """The bfloat16 nearest to amax/448, as float32; amax of any shape."""
    return as_bfloat16(usable(amax / LARGEST))


def positions(x: F32) -> NDArray[np.int64]:
    """Exponent and eight bits of mantissa, to nearest even, of each magnitude: 256·exponent + mantissa."""
    bits = np.abs(x).view(np.uint32)
    return ((bits + np.uint32(0x3FFF) + ((bits >> 15) & 1)) >> 15).astype(np.int64)


@cache
def energies() -> F64:
    """(65536,): the square of the power of two that each position's magnitudes have; 0 for subnormal numbers."""
    exponent = np.arange(256)
    squares = np.where(exponent > 0, np.exp2(2.0 * (exponent - 127)), 0.0)
    return np.repeat(squares, BINS)


@cache
def losses() -> F64:
    """(256, 128): squared error of a magnitude 1 + i/256 under a scale of mantissa 1 + j/128 and its power of two.

    Where the quotient is below 1 it has the exponent below, whose codes are twice as close.
    """
    magnitude = 1 + np.arange(BINS)[:, None] / BINS
    scale = 1 + np.arange(CANDIDATES)[None, :] / CANDIDATES
    quotient = magnitude / scale
    step = np.where(quotient >= 1, 1 / 8, 1 / 16)
    error: F64 = (scale * (quotient - np.rint(quotient / step) * step)) ** 2
    return error


def searched(histogram: F64, amax: F32) -> F32:
    """The bfloat16 scale of least squared error of each group, as float32, without saturation.

    ``histogram`` (groups, 256) holds the weighted squared powers of two of each mantissa's magnitudes; ``amax``
    (groups,). Sums run in the order of mantissas, so that the compiled version can repeat them.
    """
    error = np.zeros((len(histogram), CANDIDATES))
    for i, loss in enumerate(losses()):
        error += histogram[:, i, None] * loss
    return scale_of_candidate(error.argmin(axis=1), amax)


def scale_of_candidate(candidate: NDArray[np.intp], amax: F32) -> F32:
    """Mantissa 1 + candidate/128 with the least power of two under which amax/scale does not exceed 448."""
    mantissa = 1 + candidate / CANDIDATES
    fraction, exponent = np.frexp(
        amax.astype(np.float64)
    )  # amax = fraction · 2^exponent, fraction in [1/2, 1)
    # 448 = 0.875 · 2^9: the bound on fraction for the exponents -10, -9 and -8 beside that of amax.
    shift = np.where(fraction <= 0.4375 * mantissa, -10, np.where(fraction <= 0.875 * mantissa, -9, -8))
    return usable(np.ldexp(mantissa, exponent + shift).astype(np.float32) * (amax > 0))


def histograms(x: F32, weights: F32 | None) -> F64:
    """(groups, 256) of groups (groups, n), their elements in order; ``weights`` broadcasts against ``x``."""
    where = positions(x)
    energy = energies()[where]
    if weights is not None:
        energy *= weights
    group = np.arange(len(x))[:, None] * BINS
    counted: Any = np.bincount((where % BINS + group).ravel(), energy.ravel(), len(x) * BINS)
    histogram: F64 = counted.reshape(len(x), BINS)
    return histogram
