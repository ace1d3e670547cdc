"""File size against mean KL divergence: what each byte buys, with intervals and the noise floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from bamba_quant.evaluation.result import FIGURES, Evaluation, Figure
from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.charts.layout import (
    Box,
    Scale,
    linear,
    logarithmic,
    place_labels,
    shortened,
    text_width,
)
from bamba_quant.report.frontier import standings
from bamba_quant.report.markup import Markup
from bamba_quant.report.wording import digits, is_below_floor, plain, short_names, size

_LABEL_HEIGHT = 16.0
_LONGEST_LABEL = 24
_FAR_BELOW = 30.0  # a floor this many times smaller than every figure would leave them no room
_STRIP = 40.0  # pixels


def size_divergence(evaluation: Evaluation, width: float) -> Markup:
    """A point a candidate; both axes logarithmic where the values span enough. Grows in height until labels fit."""
    height = 300.0 if width < 500 else 400.0
    states = [standing.state for standing in standings(evaluation)]
    while True:
        drawn = _draw(evaluation, states, Frame(width, height, left=58, top=30))
        if drawn is not None:
            return drawn
        height += 60


def _draw(evaluation: Evaluation, states: Sequence[str], frame: Frame) -> Markup | None:
    inner = frame.inner
    candidates = evaluation.candidates
    klds = [candidate.figures["kld_mean"] for candidate in candidates]
    sizes = [float(candidate.model.file_bytes) for candidate in candidates]
    floor = evaluation.noise_floor.figures.get("kld_mean") if evaluation.noise_floor else None
    y = _divergence_scale(klds, floor, inner)
    x = _size_scale(sizes, inner)
    points = [(x(n_bytes), _height(kld, y, inner)) for n_bytes, kld in zip(sizes, klds, strict=True)]
    whiskers = [_whisker(kld, y, point) for kld, point in zip(klds, points, strict=True)]
    names = [shortened(name, _LONGEST_LABEL) for name in short_names(evaluation)]
    best = sorted(
        point
        for point, kld, state in zip(points, klds, states, strict=True)
        if state == "frontier" and not _hidden(kld)
    )
    obstacles = [Box(px - 8, py - 8, px + 8, py + 8) for px, py in points] + whiskers
    shade = _floor_box(floor, y, inner)
    if shade is not None:  # labels may stand below the floor, but not on its line or its name
        obstacles.append(Box(shade.left, shade.top - 2, shade.right, shade.top + 2))
        obstacles.append(Box(shade.left, shade.top - 18, shade.left + 210, shade.top + 20))
    widths = [text_width(name, canvas.FONT) for name in names]
    # Clear of the frontier's line, if there is room for that.
    boxes = place_labels(points, widths, _LABEL_HEIGHT, inner, obstacles + _along(best)) or place_labels(
        points, widths, _LABEL_HEIGHT, inner, obstacles
    )
    if boxes is None:
        return None
    marks = [
        canvas.group(
            _leader(box, point),
            canvas.line(point[0], whisker.top, point[0], whisker.bottom, f"whisker s{i % canvas.SERIES}"),
            canvas.marker(
                i,
                *point,
                6.0,
                canvas.hint(_hint(evaluation, i)),
                class_="hollow" if state == "dominated" else "mark",
            ),
            canvas.text(name, box.left, box.bottom - 4, class_="strong halo"),
        )
        for i, (name, box, point, whisker, state) in enumerate(
            zip(names, boxes, points, whiskers, states, strict=True)
        )
    ]
    return canvas.picture(
        frame.width,
        frame.height,
        "File size against mean KL divergence",
        "; ".join(_hint(evaluation, i) for i in range(len(candidates))),
        _floor(floor, y, shade),
        canvas.bottom_axis(frame, x, "file size, MB", _megabytes, most=4 if frame.narrow else 7),
        canvas.left_axis(frame, y, "mean KL divergence, nats (lower is better)", plain),
        canvas.border(frame),
        canvas.path(best, "frontier") if len(best) > 1 else Markup(),
        *marks,
    )


def _divergence_scale(klds: list[Figure], floor: float | None, inner: Box) -> Scale:
    """A scale of the measurable values, with space below for the others and for a floor far below."""
    values = [
        value for kld in klds if not _hidden(kld) for value in (kld.value, kld.high) if value is not None
    ]
    values += [
        kld.low for kld in klds if kld.low is not None and kld.low > kld.value / 10 and not _hidden(kld)
    ]
    near = [floor] if floor and floor > min(values, default=0.0) / _FAR_BELOW else []
    strip = _STRIP if any(map(_hidden, klds)) or (floor is not None and not near) else 0.0
    return logarithmic(values + near, inner.bottom - strip, inner.top)


def _hidden(kld: Figure) -> bool:
    """Whether a divergence is zero or below the noise floor."""
    return kld.value <= 0 or is_below_floor(FIGURES["kld_mean"], kld)


def _height(kld: Figure, y: Scale, inner: Box) -> float:
    return (y.start + inner.bottom) / 2 if _hidden(kld) else y(kld.value)


def _size_scale(sizes: list[float], inner: Box) -> Scale:
    if max(sizes) > 6 * min(sizes):
        return logarithmic(sizes, inner.left, inner.right)
    return linear([*sizes, 0.9 * min(sizes), 1.06 * max(sizes)], inner.left, inner.right)


def _whisker(kld: Figure, y: Scale, point: tuple[float, float]) -> Box:
    px, py = point
    if _hidden(kld) or kld.low is None or kld.high is None:
        return Box(px - 2, py, px + 2, py)
    return Box(px - 2, y(kld.high), px + 2, y(max(kld.low, y.low)))


def _along(points: list[tuple[float, float]]) -> list[Box]:
    """Small boxes along the line through ``points``, which labels leave free."""
    return [
        Box(x - 4, y - 4, x + 4, y + 4)
        for (x1, y1), (x2, y2) in pairwise(points)
        for steps in [math.ceil(math.hypot(x2 - x1, y2 - y1) / 9)]
        for i in range(steps)
        for x, y in [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps)]
    ]


def _leader(box: Box, point: tuple[float, float]) -> Markup:
    """A thin line from a point to a label that is not next to it."""
    px, py = point
    nx, ny = min(max(px, box.left), box.right), min(max(py, box.top), box.bottom)
    distance = math.hypot(nx - px, ny - py)
    if distance < 14:
        return Markup()
    share = 8 / distance
    return canvas.line(px + share * (nx - px), py + share * (ny - py), nx, ny, "leader")


def _floor_box(floor: float | None, y: Scale, inner: Box) -> Box | None:
    """The area below the noise floor: from its line down, or a strip under the axis if the floor is below it."""
    if floor is None:
        return None
    top = y.start if floor < y.low else y(floor)
    return Box(inner.left, top, inner.right, max(inner.bottom, top))


def _floor(floor: float | None, y: Scale, shade: Box | None) -> Markup:
    if floor is None or shade is None:
        return Markup()
    off = floor < y.low
    words = f"noise floor: {digits(floor, 2)}" + (", below this axis" if off else "")
    inside = off or shade.bottom - shade.top > 18
    return canvas.group(
        canvas.rectangle(shade, "below"),
        canvas.line(shade.left, shade.top, shade.right, shade.top, "floor"),
        canvas.text(words, shade.left + 6, shade.top + (15 if inside else -5), class_="tick"),
    )


def _megabytes(n_bytes: float) -> str:
    return plain(n_bytes / 1e6)


def _hint(evaluation: Evaluation, index: int) -> str:
    candidate = evaluation.candidates[index]
    kld = candidate.figures["kld_mean"]
    between = (
        f" ({digits(kld.low, 3)} to {digits(kld.high, 3)})"
        if kld.low is not None and kld.high is not None
        else ""
    )
    name = short_names(evaluation)[index]
    return f"{name}: {size(candidate.model.file_bytes)}, mean KLD {digits(kld.value, 3)}{between}"
