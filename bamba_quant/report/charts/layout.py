"""A chart's axes (values to coordinates, with round numbers to mark) and places for its labels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bamba_quant.printable import printable

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
        """The coordinate of ``value``, clipped to the axis."""
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
    step = _round_end_step(high - low, most)
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


def _round_end_step(span: float, most: int) -> float:
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


_STEP = 7.0  # pixels between places that are tried


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


def text_width(text: str, size: float) -> float:
    """Pixels that ``text`` takes at most, about, at a font size in pixels: no font is at hand to ask."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return size * (0.6 * (len(text) - wide) + 1.05 * wide)


def shortened(text: str, most: int) -> str:
    """``text`` as it shows, in at most ``most`` characters; the end goes, since names begin with what differs."""
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def place_labels(
    anchors: Sequence[tuple[float, float]],
    widths: Sequence[float],
    height: float,
    frame: Box,
    obstacles: Sequence[Box],
    *,
    gap: float = 9.0,
) -> tuple[Box, ...] | None:
    """A box of each label's width near its anchor, inside ``frame``, clear of ``obstacles`` and of one another.

    Places are tried from near to far, to the right first. None when a label finds no place: draw on a larger frame.
    """
    taken = list(obstacles)
    boxes: list[Box] = []
    for (x, y), width in zip(anchors, widths, strict=True):
        found = next(
            (
                box
                for box in _places(x, y, width, height, frame, gap)
                if frame.holds(box) and not any(box.overlaps(other) for other in taken)
            ),
            None,
        )
        if found is None:
            return None
        boxes.append(found)
        taken.append(found)
    return tuple(boxes)


def _places(x: float, y: float, width: float, height: float, frame: Box, gap: float) -> Iterator[Box]:
    farthest = max(frame.right - frame.left, frame.bottom - frame.top)
    ring = 0
    while ring * _STEP <= farthest:
        away = gap + ring * _STEP
        for across, down in _directions(ring):
            left = x + away if across > 0 else x - away - width if across < 0 else x - width / 2
            middle = y + down * (away + (height / 2 if not across else 0))
            yield Box(left, middle - height / 2, left + width, middle + height / 2)
        ring += 1


def _directions(ring: int) -> Iterator[tuple[int, float]]:
    """Which side of the anchor (right 1, left -1, centred 0) and how far down, as a share of the distance."""
    yield from ((1, 0.0), (-1, 0.0), (0, -1.0), (0, 1.0))
    for down in (-0.5, 0.5, -1.0, 1.0):
        yield from ((1, down), (-1, down)) if ring else ()
