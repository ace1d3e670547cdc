"""Where a chart's labels go so that none covers another, a mark or the frame."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bamba_quant.printable import printable

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
