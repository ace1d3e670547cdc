"""ggml's searches for a group's scale, minimum and integers, vectorised over groups, bit for bit.

Groups lie along the trailing axes: ``x`` has shape (n, …) and every sum runs serially over the leading
axis. Integers come back as float32, which holds them exactly. Line numbers are ggml-quants.c's at llama.cpp
0c1e570.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bamba_quant.codecs.arithmetic import (
    ONE,
    ZERO,
    extremes,
    largest,
    nearest_clipped,
    nearest_int,
    ratio,
    serial_sum,
)
from bamba_quant.codecs.arrays import F32

GROUP_MAX_EPS = np.float32(1e-15)
SWEEPS = 5  # of the searches that move one integer at a time


@dataclass(frozen=True)
class ScaleTrials:
    """The scales that make_qkx2/3 tries: nmax + rmin + rdelta·i over the group's range, i = 0 … nstep."""

    nmax: int
    rmin: float
    rdelta: float
    nstep: int

    @cached_property
    def spans(self) -> F32:
        """(nstep + 1,) float32, each operation rounded as in C."""
        i = np.arange(self.nstep + 1, dtype=np.float32)
        spans: F32 = np.float32(self.rmin) + np.float32(self.rdelta) * i + np.float32(self.nmax)
        return spans


def spans_around(nmax: int, reach: int) -> F32:
    """nmax + 0.1·i for i = -reach … reach without 0: the scales that make_qx and make_qp try."""
    i = np.array([i for i in range(-reach, reach + 1) if i], np.float32)
    spans: F32 = np.float32(0.1) * i + np.float32(nmax)
    return spans


def make_qx_quants(x: F32, nmax: int, weights: F32 | None = None) -> tuple[F32, F32]:
    """One signed scale a group, integers in [-nmax, nmax) stored with nmax added (line 628, rmse_type 1).

    Returns scale (…) and L (n, …). ``weights`` defaults to x². A group below 1e-15 gets scale 0 and L 0.
    """
    greatest = largest(x)
    w = x * x if weights is None else weights
    wx = w * x

    def fit(iscale: F32) -> tuple[F32, F32, F32]:
        q = nearest_clipped(iscale * x, -nmax, nmax - 1)
        return q, serial_sum(wx * q), serial_sum(w * q * q)

    L, sumlx, suml2 = fit(np.float32(-nmax) / greatest)
    scale = np.where(suml2 != 0, sumlx / suml2, ZERO)
    best = scale * sumlx
    for span in spans_around(nmax, 9):
        q, sumlx, suml2 = fit(-span / greatest)
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        np.copyto(L, q, where=better)
        scale = np.where(better, sumlx / suml2, scale)
        best = np.where(better, scale * sumlx, best)
    tiny = np.abs(greatest) < GROUP_MAX_EPS
    return np.where(tiny, ZERO, scale), np.where(tiny, ZERO, L + np.float32(nmax))


def make_q3_quants(x: F32, nmax: int) -> tuple[F32, F32]:
    """As ``make_qx_quants`` with weights x², but integers move in turn while that helps (line 697)."""
    greatest = largest(x)
    w = x * x
    wx = w * x
    L = nearest_clipped(np.float32(-nmax) / greatest * x, -nmax, nmax - 1)
    sumlx, suml2 = serial_sum(wx * L), serial_sum(w * L * L)
    for _ in range(SWEEPS):
        for i in range(len(x)):
            slx = sumlx - wx[i] * L[i]
            sl2 = suml2 - w[i] * L[i] * L[i]
            q = nearest_clipped(x[i] * sl2 / slx, -nmax, nmax - 1)
            moves = (slx > 0) & (q != L[i])
            slx = slx + wx[i] * q
            sl2 = sl2 + w[i] * q * q
            moves &= (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            np.copyto(L[i], q, where=moves)
            sumlx = np.where(moves, slx, sumlx)
            suml2 = np.where(moves, sl2, suml2)
    tiny = np.abs(greatest) < GROUP_MAX_EPS
    return np.where(tiny, ZERO, ratio(sumlx, suml2)), np.where(tiny, ZERO, L + np.float32(nmax))


def make_qkx_quants(
    x: F32, weights: F32, trials: ScaleTrials, absolute: bool = False
) -> tuple[F32, F32, F32]:
    """A scale and a minimum a group, integers in [0, nmax] (lines 799 and 993: equal for x without NaN).

    Returns scale (…), the minimum with its sign turned (…) and L (n, …). The error is Σ w·|difference| when
    ``absolute``, else Σ w·difference². Each span is divided by the distance from the *running* minimum to the
    greatest: an accepted step moves the steps after it.
    """
    low, high = extremes(x)
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for w, value in zip(weights[1:], x[1:], strict=True):
        sum_w = sum_w + w
        sum_x = sum_x + w * value
    low = np.where(low > 0, ZERO, low)
    flat = high == low

    def error(q: F32, scale: F32, low: F32) -> F32:
        difference = scale * q + low - x
        return serial_sum(weights * (np.abs(difference) if absolute else difference * difference))

    iscale = np.float32(trials.nmax) / (high - low)
    scale = ONE / iscale
    L = nearest_clipped(iscale * (x - low), 0, trials.nmax)
    best = error(L, scale, low)
    for span in trials.spans:
        q = nearest_clipped(span / (high - low) * (x - low), 0, trials.nmax)
        wq = weights * q
        sum_l, sum_l2, sum_xl = serial_sum(wq), serial_sum(wq * q), serial_sum(wq * x)
        D = sum_w * sum_l2 - sum_l * sum_l
        step_scale = (sum_w * sum_xl - sum_x * sum_l) / D
        step_low = (sum_l2 * sum_x - sum_l * sum_xl) / D
        above = step_low > 0
        step_scale = np.where(above, sum_xl / sum_l2, step_scale)
        step_low = np.where(above, ZERO, step_low)
        step_error = error(q, step_scale, step_low)
        better = (D > 0) & (step_error < best) & ~flat
        np.copyto(L, q, where=better)
        best = np.where(better, step_error, best)
        scale = np.where(better, step_scale, scale)
        low = np.where(better, step_low, low)
    return np.where(flat, ZERO, scale), -low, np.where(flat, ZERO, L)


def make_qp_quants(x: F32, nmax: int, weights: F32) -> tuple[F32, F32]:
    """One scale for non-negative numbers, integers up to nmax (line 1076): returns scale (…) and L (n, …).

    L wraps to a uint8: the search can return a negative number.
    """
    greatest = np.zeros(x.shape[1:], np.float32)
    for item in x:
        greatest = np.where(greatest > item, greatest, item)
    iscale = np.float32(nmax) / greatest

    def error(q: F32, scale: F32) -> F32:
        difference = x - scale * q
        return serial_sum(weights * difference * difference)

    best = error(_wrapped(nearest_int(iscale * x).astype(np.float32)), ONE / iscale)
    for span in spans_around(nmax, 4):
        step = span / greatest
        step_error = error(_nearest_capped(step * x, nmax), ONE / step)
        better = step_error < best
        best = np.where(better, step_error, best)
        iscale = np.where(better, step, iscale)
    q = _nearest_capped(iscale * x, nmax)
    sumlx, suml2 = serial_sum(weights * x * q), serial_sum(weights * q * q)
    L = _wrapped(q)
    for _ in range(SWEEPS):
        for i, w in enumerate(weights):
            slx = sumlx - w * x[i] * L[i]
            sl2 = suml2 - w * L[i] * L[i]
            q = _nearest_capped(x[i] * sl2 / slx, nmax)
            moves = (slx > 0) & (sl2 > 0) & (q != L[i])
            slx = slx + w * x[i] * q
            sl2 = sl2 + w * q * q
            moves &= slx * slx * suml2 > sumlx * sumlx * sl2
            np.copyto(L[i], _wrapped(q), where=moves)
            sumlx = np.where(moves, slx, sumlx)
            suml2 = np.where(moves, sl2, suml2)
    tiny = greatest < GROUP_MAX_EPS
    return np.where(tiny, ZERO, ratio(sumlx, suml2)), np.where(tiny, ZERO, L)


def _nearest_capped(v: F32, nmax: int) -> F32:
    return np.minimum(nearest_int(v), np.int32(nmax)).astype(np.float32)


def _wrapped(q: F32) -> F32:
    return (q.astype(np.int32) & 255).astype(np.float32)
