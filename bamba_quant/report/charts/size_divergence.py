"""File size against mean KL divergence: what each byte buys, with intervals and the noise floor."""

from __future__ import annotations

import math
from dataclasses import replace

from bamba_quant.evaluation.result import Evaluation, Figure
from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.labels import Box, place_labels, shortened, text_width
from bamba_quant.report.markup import Markup
from bamba_quant.report.numbers import digits, plain, size
from bamba_quant.report.scales import Scale, linear, logarithmic
from bamba_quant.report.view import short_names

_LABEL_HEIGHT = 16.0
_LONGEST_LABEL = 24
_FAR_BELOW = 30.0  # a floor this many times smaller than every figure would leave them no room
_STRIP = 22.0  # pixels


def size_divergence(evaluation: Evaluation, width: float) -> Markup:
    """A point a candidate; both axes logarithmic where the values span enough. Grows in height until labels fit."""
    height = 300.0 if width < 500 else 400.0
    while True:
        drawn = _draw(evaluation, Frame(width, height, left=58, top=30))
        if drawn is not None:
            return drawn
        height += 60


def _draw(evaluation: Evaluation, frame: Frame) -> Markup | None:
    inner = frame.inner
    candidates = evaluation.candidates
    klds = [candidate.figures["kld_mean"] for candidate in candidates]
    sizes = [float(candidate.model.file_bytes) for candidate in candidates]
    floor = evaluation.noise_floor.figures.get("kld_mean") if evaluation.noise_floor else None
    y = _divergence_scale(klds, floor, inner)
    if floor is not None and floor < y.low:
        y = replace(y, start=inner.bottom - _STRIP)  # room for a floor that lies off the axis
    x = _size_scale(sizes, inner)
    points = [(x(n_bytes), y(kld.value)) for n_bytes, kld in zip(sizes, klds, strict=True)]
    whiskers = [_whisker(kld, y, px) for kld, (px, _) in zip(klds, points, strict=True)]
    names = [shortened(name, _LONGEST_LABEL) for name in short_names(evaluation)]
    obstacles = [Box(px - 8, py - 8, px + 8, py + 8) for px, py in points] + whiskers
    shade = _floor_box(floor, y, inner)
    if shade is not None:
        obstacles.append(shade)
    boxes = place_labels(
        points, [text_width(name, canvas.FONT) for name in names], _LABEL_HEIGHT, inner, obstacles
    )
    if boxes is None:
        return None
    marks = [
        canvas.group(
            _leader(box, point),
            canvas.line(point[0], whisker.top, point[0], whisker.bottom, f"whisker s{i % canvas.SERIES}"),
            canvas.marker(i, *point, 6.0, canvas.hint(_hint(evaluation, i))),
            canvas.text(name, box.left, box.bottom - 4, class_="strong"),
        )
        for i, (name, box, point, whisker) in enumerate(zip(names, boxes, points, whiskers, strict=True))
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
        *marks,
    )


def _divergence_scale(klds: list[Figure], floor: float | None, inner: Box) -> Scale:
    values = [kld.value for kld in klds] + [kld.high for kld in klds if kld.high is not None]
    values += [kld.low for kld in klds if kld.low is not None and kld.low > kld.value / 10]
    least = min((value for value in values if value > 0), default=1.0)
    values += [floor] if floor and floor > least / _FAR_BELOW else []
    return logarithmic(values, inner.bottom, inner.top)


def _size_scale(sizes: list[float], inner: Box) -> Scale:
    if max(sizes) > 6 * min(sizes):
        return logarithmic(sizes, inner.left, inner.right)
    return linear([*sizes, 0.9 * min(sizes), 1.06 * max(sizes)], inner.left, inner.right)


def _whisker(kld: Figure, y: Scale, px: float) -> Box:
    low = kld.value if kld.low is None else kld.low
    high = kld.value if kld.high is None else kld.high
    return Box(px - 2, y(high), px + 2, y(max(low, y.low)))


def _leader(box: Box, point: tuple[float, float]) -> Markup:
    """A thin line from a point to a label that had to stand off."""
    px, py = point
    nx, ny = min(max(px, box.left), box.right), min(max(py, box.top), box.bottom)
    distance = math.hypot(nx - px, ny - py)
    if distance < 14:
        return Markup()
    share = 8 / distance
    return canvas.line(px + share * (nx - px), py + share * (ny - py), nx, ny, "leader")


def _floor_box(floor: float | None, y: Scale, inner: Box) -> Box | None:
    """What lies below the noise floor: down from its line, or a strip under the axis when it is farther down."""
    if floor is None:
        return None
    top = inner.bottom - _STRIP if floor < y.low else y(floor)
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
