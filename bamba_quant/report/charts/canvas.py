"""What every chart is drawn with: a frame, axes with grid lines, marks that differ in shape as well as in colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bamba_quant.report.charts.layout import Box, Scale, text_width
from bamba_quant.report.markup import Markup, coordinate_text, element

FONT = 12.0  # pixels, as page.css sets it inside charts
SERIES = 8  # colours that page.css knows


@dataclass(frozen=True)
class Frame:
    """A picture's size and the margins around what is plotted, in pixels."""

    width: float
    height: float
    left: float = 56.0
    right: float = 14.0
    top: float = 16.0
    bottom: float = 44.0

    @property
    def inner(self) -> Box:
        return Box(self.left, self.top, self.width - self.right, self.height - self.bottom)

    @property
    def narrow(self) -> bool:
        return self.width < 500


def picture(width: float, height: float, title: str, description: str, *parts: Markup) -> Markup:
    """One SVG that says aloud what it shows, at its natural size or as wide as the page if that is less."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *parts,
        role="img",
        aria_label=f"{title}. {description}",
        viewBox=f"0 0 {coordinate_text(width)} {coordinate_text(height)}",
        width=width,
        height=height,
        class_="chart",
    )


def text(words: str, x: float, y: float, *, anchor: str = "start", class_: str | None = None) -> Markup:
    return element("text", words, x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(box: Box, class_: str, *children: Markup, **attributes: str | float | None) -> Markup:
    return element(
        "rect",
        *children,
        x=box.left,
        y=box.top,
        width=max(box.right - box.left, 0.0),
        height=max(box.bottom - box.top, 0.0),
        class_=class_,
        **attributes,
    )


def group(*parts: Markup, class_: str | None = None) -> Markup:
    return element("g", *parts, class_=class_)


def hint(words: str) -> Markup:
    """What a browser shows while the pointer rests on a mark."""
    return element("title", words)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through ``points``."""
    steps = "L".join(f"{coordinate_text(x)} {coordinate_text(y)}" for x, y in points)
    return element("path", d=f"M{steps}", class_=class_)


def marker(kind: int, x: float, y: float, radius: float, *children: Markup, class_: str = "mark") -> Markup:
    """The ``kind``-th shape around (x, y), in the ``kind``-th colour."""
    shape = _SHAPES[kind % len(_SHAPES)]
    steps = "L".join(
        f"{coordinate_text(x + radius * dx)} {coordinate_text(y + radius * dy)}" for dx, dy in shape
    )
    classes = f"{class_} s{kind % SERIES}"
    if not shape:
        return element("circle", *children, cx=x, cy=y, r=radius, class_=classes)
    return element("path", *children, d=f"M{steps}Z", class_=classes)


_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    ((0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)),
    ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    ((-1.2, 0), (-0.6, -1.04), (0.6, -1.04), (1.2, 0), (0.6, 1.04), (-0.6, 1.04)),
    ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
     (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    ((0, -1.3), (0.4, -0.4), (1.3, -0.4), (0.6, 0.2), (0.9, 1.1), (0, 0.55), (-0.9, 1.1), (-0.6, 0.2),
     (-1.3, -0.4), (-0.4, -0.4)),
)  # fmt: skip


def bottom_axis(
    frame: Frame, scale: Scale, name: str, write: Callable[[float], str], *, most: int = 7
) -> Markup:
    """Ticks, numbers and name under the plot; numbers that would touch the one before are left out."""
    inner = frame.inner
    parts: list[Markup] = []
    free_from = float("-inf")
    for value in scale.ticks(most):
        x, words = scale(value), write(value)
        half = text_width(words, FONT) / 2
        middle = min(max(x, half), frame.width - half)
        parts.append(line(x, inner.top, x, inner.bottom, "grid"))
        if middle - half >= free_from:
            parts.append(text(words, middle, inner.bottom + 16, anchor="middle", class_="tick"))
            free_from = middle + half + 4
    parts.append(
        text(name, (inner.left + inner.right) / 2, inner.bottom + 35, anchor="middle", class_="name")
    )
    return group(*parts)


def left_axis(
    frame: Frame, scale: Scale, name: str, write: Callable[[float], str], *, most: int = 7
) -> Markup:
    """Ticks and numbers left of the plot; the name is above them, in horizontal text."""
    inner = frame.inner
    parts = [
        group(
            line(inner.left, scale(value), inner.right, scale(value), "grid"),
            text(write(value), inner.left - 7, scale(value) + 4, anchor="end", class_="tick"),
        )
        for value in scale.ticks(most)
    ]
    return group(*parts, text(name, 0, inner.top - 13, class_="name"))


def border(frame: Frame) -> Markup:
    return rectangle(frame.inner, "border")
