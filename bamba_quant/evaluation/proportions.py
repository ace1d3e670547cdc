"""Intervals of shares that have few exceptions, which no resampling of chunks can give: most draws would have none.

Korn and Graubard's (Survey Methodology 24, 1998): the exact binomial interval (Clopper and Pearson 1934) of as many
tokens as would, if they were independent, leave the share as uncertain as chunks show it to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bamba_quant.evaluation.intervals import F64, LEAST_CHUNKS, Bounds, student

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
