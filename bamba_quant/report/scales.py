"""Axes: from values to coordinates, with round numbers to mark on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Values ``low`` to ``high`` onto coordinates ``start`` to ``end``, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``; what lies outside is put on the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> tuple[float, ...]:
        """At most about ``most`` round values inside, in order: 1, 2, 5 and powers of ten on a logarithmic scale."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def linear(values: Sequence[float], start: float, end: float, *, zero: bool = False, most: int = 6) -> Scale:
    """A linear scale from a round value below all to one above; with ``zero`` it begins or ends at zero."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = _step(high - low, most)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale around all positive values, with a little room at both ends."""
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=10.0)
    room = max((high / low) ** 0.06, 1.25)
    return Scale(low / room, high * room, start, end, log=True)


def _linear_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """The multiples of the smallest round step of which at most ``most`` lie inside."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * scale * ten for ten in (1, 10, 100) for scale in _STEPS[:-1]):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return tuple(round(number * step, 12) for number in range(first, last + 1))
    return (low, high)


def _step(span: float, most: int) -> float:
    least = span / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: tuple[float, ...] = ()
    for mantissas in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = tuple(
            value
            for exponent in exponents
            for value in (float(f"{mantissa}e{exponent}") for mantissa in mantissas)
            if low <= value <= high
        )
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]
