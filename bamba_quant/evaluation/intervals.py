"""Intervals for dependent tokens: whole chunks are resampled, or taken to be independent, not tokens.

Figures that are smooth functions of means get studentized bootstrap intervals (bootstrap-t: Efron 1982, chapter 10;
Hall 1992, section 3.5), whose error falls with 1/n for skewed data where percentiles' and Student's fall with
1/√n. Quantiles get Woodruff's (1952): an interval for the share of tokens below the quantile, with its error estimated
between chunks (Francisco and Fuller 1991), carried through the distribution.

Proportions with few exceptions, of which most resamples would have none, get Korn and Graubard's interval (Survey
Methodology 24, 1998): the exact binomial one (Clopper and Pearson 1934) of as many tokens as would, if they were
independent, leave the proportion as uncertain as the chunks show it to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

# Fewer chunks give no interval: their own spread is not known well enough.
LEAST_CHUNKS = 8
# Nor does a quantile have one with fewer tokens expected beyond it.
LEAST_BEYOND = 8
RESAMPLES = 10_000
_BLOCK = 1000
_ALIKE = 1e-5


@dataclass(frozen=True)
class Bounds:
    """``low`` to ``high``: two-sided 95 %. ``lower`` and ``upper``: one-sided 95 % each."""

    low: float
    high: float
    lower: float
    upper: float


def identity(theta: Any) -> Any:
    """The display of a figure that needs no conversion."""
    return theta


# An increasing function of floats or arrays.
Display = Callable[[Any], Any]


@dataclass(frozen=True)
class SmoothStatistic:
    """A figure ``shown(statistic(m))`` of k means m: both act on the last axis, ``shown`` rises.

    ``gradient`` is the statistic's, (…, k) to (…, k).
    """

    statistic: Callable[[F64], F64]
    gradient: Callable[[F64], F64]
    shown: Display = identity


class Bootstrap:
    """Resamples of n chunks, the same for every figure, so that figures are compared on the same draws."""

    def __init__(self, chunks: int, seed: int, resamples: int = RESAMPLES) -> None:
        self.chunks = chunks
        generator = np.random.default_rng(seed)
        self._counts = generator.multinomial(chunks, np.full(chunks, 1 / chunks), size=resamples).astype(
            np.uint16
        )

    def bounds(self, means: F64, figure: SmoothStatistic) -> Bounds | None:
        """Bounds of a figure of the means over chunks of ``means`` (n, k).

        None for too few chunks, and where too few of them differ for a bootstrap.
        """
        if self.chunks < LEAST_CHUNKS:
            return None
        mean = means.mean(0)  # (k,)
        theta, error = float(figure.statistic(mean)), self._errors(means, figure)
        if not math.isfinite(theta) or not error > 0:
            exact = float(figure.shown(theta))
            return Bounds(exact, exact, exact, exact) if math.isfinite(exact) else None
        # How far each resample's figure is from the sample's, in that resample's own standard errors.
        t = np.concatenate(
            [
                self._deviations(means, figure, theta, error, self._counts[start : start + _BLOCK])
                for start in range(0, len(self._counts), _BLOCK)
            ]
        )
        with np.errstate(invalid="ignore"):
            cuts = np.quantile(t, (0.975, 0.025, 0.95, 0.05))
        if not np.isfinite(cuts).all():
            return None
        return Bounds(*(float(figure.shown(theta - cut * error)) for cut in cuts))

    def _errors(self, means: F64, figure: SmoothStatistic) -> float:
        """The standard error by linearization: that of the mean of gradient · (x - m)."""
        mean = means.mean(0)
        influence = (means - mean) @ figure.gradient(mean)
        return float(np.sqrt(np.square(influence).mean() / (len(means) - 1)))

    def _deviations(
        self, means: F64, figure: SmoothStatistic, theta: float, whole: float, counts: NDArray[np.uint16]
    ) -> F64:
        n, k = means.shape
        share = counts / n  # (R, n)
        drawn = share @ means  # (R, k)
        products = (means[:, :, None] * means[:, None, :]).reshape(n, -1)
        moments = (share @ products).reshape(-1, k, k)  # (R, k, k)
        gradient = figure.gradient(drawn)  # (R, k)
        variance = np.einsum("ri,ri->r", (moments @ gradient[:, :, None])[:, :, 0], gradient)
        variance -= np.square(np.einsum("ri,ri->r", gradient, drawn))
        error = np.sqrt(np.maximum(variance, 0) / (n - 1))
        error[error < _ALIKE * whole] = 0  # what rounding leaves of chunks that are all alike
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (figure.statistic(drawn) - theta) / error
        known: F64 = np.where(np.isnan(t), 0.0, t)  # a resample like the sample, of chunks that are all alike
        return known


def quantile_bounds(values: F64, fraction: float) -> Bounds | None:
    """Bounds of the quantile ``fraction`` of ``values`` (n chunks, tokens); None for too few chunks or tokens."""
    n = len(values)
    if n < LEAST_CHUNKS or values.size < least_tokens(fraction):
        return None
    ordered = np.sort(values, axis=None)
    at = quantile(ordered, fraction)
    below = (values <= at).mean(1)  # (n,), independent between chunks
    # The share's error if it were ``fraction``, widened as much as chunks make tokens alike (design effect).
    shares = float(below.mean())
    plain = max(shares * (1 - shares), 1 / values.size) / values.size
    effect = max(1.0, float(below.var(ddof=1)) / n / plain)
    error = math.sqrt(fraction * (1 - fraction) * effect / values.size)

    def at_share(share: float) -> float:
        return quantile(ordered, min(1.0, max(0.0, share)))

    wide, one = student(0.975, n - 1) * error, student(0.95, n - 1) * error
    return Bounds(
        at_share(fraction - wide),
        at_share(fraction + wide),
        at_share(fraction - one),
        at_share(fraction + one),
    )


def least_tokens(fraction: float) -> int:
    """How many tokens it takes for an interval of the quantile ``fraction``."""
    return math.ceil(LEAST_BEYOND / min(fraction, 1 - fraction) - 1e-6)


def quantile(ordered: F64, fraction: float) -> float:
    """Linear interpolation at ``fraction`` · (N - 1) in ascending values, as llama-perplexity does."""
    place = fraction * (len(ordered) - 1)
    whole = int(place)
    rest = place - whole
    return float((1 - rest) * ordered[whole] + rest * ordered[min(whole + 1, len(ordered) - 1)])


def student(level: float, degrees: int) -> float:
    """Student's t by its expansion in 1/degrees (Abramowitz and Stegun 26.7.5); to 1e-3 from 7 degrees on."""
    z = NormalDist().inv_cdf(level)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3


# With an exception in fewer chunks than these, one resample of 2,981 or more has none.
LEAST_EXCEPTIONAL = 8


def has_few_exceptions(shares: F64) -> bool:
    """Whether the share of too few of the chunks ``shares`` (n,) differs from all, or of too few from none."""
    return min(int((shares > 0).sum()), int((shares < 1).sum())) < LEAST_EXCEPTIONAL


def share_bounds(shares: F64, tokens: int) -> Bounds | None:
    """Bounds of the mean of ``shares`` (n,), one a chunk, of ``tokens`` tokens in all; None for too few chunks."""
    n, p = len(shares), float(shares.mean())
    if n < LEAST_CHUNKS:
        return None
    variance = float(shares.var(ddof=1)) / n
    plain = p * (1 - p) / tokens
    effective = tokens * min(1.0, plain / variance) if variance else float(tokens)

    def side(level: float) -> tuple[float, float]:
        normal = student(level, 1_000_000)
        size = effective * (normal / student(level, n - 1)) ** 2 if variance else effective
        below = beta_quantile(1 - level, p * size, (1 - p) * size + 1) if p > 0 else 0.0
        above = beta_quantile(level, p * size + 1, (1 - p) * size) if p < 1 else 1.0
        return below, above

    (low, high), (lower, upper) = side(0.975), side(0.95)
    return Bounds(low, high, lower, upper)


def gain_bounds(gained: Bounds, lost: Bounds) -> Bounds:
    """Bounds of gained - lost, no tighter than they must be: all that can be lost against all that can be gained."""
    return Bounds(-lost.high, gained.high, -lost.upper, gained.upper)


def beta_quantile(level: float, a: float, b: float) -> float:
    """x with I_x(a, b) = ``level``, by bisection."""
    return _bisected(lambda x: beta_share(x, a, b) < level)


def beta_share(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # Lentz's recurrence (Thompson and Barnett 1986).
    tiny = 1e-300
    c, d = 1.0, 1 / _apart(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = _apart(1 + step / c, tiny), 1 / _apart(1 + step * d, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return math.exp(log_front) * fraction / a


def _apart(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _bisected(below: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2
