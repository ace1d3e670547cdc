"""One figure of every file over the reports that measured it."""

from __future__ import annotations

from collections.abc import Sequence

from bamba_quant.report import wording
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
from bamba_quant.report.history import History, Step
from bamba_quant.report.markup import Markup

_LONGEST_NAME = 20


def history_chart(history: History, width: float) -> Markup:
    """A line a file; the reports stand at equal distances, in the order of their dates."""
    height = 320.0 if width < 500 else 420.0
    while (drawn := _draw(history, Frame(width, height, left=62, top=30, bottom=62))) is None:
        height += 60
    return drawn


def _draw(history: History, frame: Frame) -> Markup | None:
    inner, last = frame.inner, len(history.reports) - 1
    drawn = {name: found for name, steps in history.steps.items() if (found := _drawn(history, steps))}
    names = [shortened(name, _LONGEST_NAME) for name in drawn]
    widths = [text_width(name, canvas.FONT) for name in names]
    y = _scale(history, drawn, inner)
    reach = inner.right - 18 - max(widths, default=0.0)  # labels stand right of the newest report

    first = inner.left + 40
    where = [first + (reach - first) * (i / last if last else 0.5) for i in range(last + 1)]
    points = {
        name: [
            (where[history.reports.index(step.report)], y(_value(history, step.found.figure.value)))
            for step in steps
        ]
        for name, steps in drawn.items()
    }
    obstacles = [Box(x - 8, py - 8, x + 8, py + 8) for found in points.values() for x, py in found]
    boxes = place_labels([found[-1] for found in points.values()], widths, 16.0, inner, obstacles)
    if boxes is None:
        return None
    series = [
        canvas.group(
            *_lines(i, drawn[name], found),
            *(_mark(i, history, name, step, point, y) for step, point in zip(drawn[name], found, strict=True)),
            canvas.text(label, box.left, box.bottom - 4, class_="strong halo"),
        )
        for i, ((name, found), label, box) in enumerate(zip(points.items(), names, boxes, strict=True))
    ]  # fmt: skip
    percent = ", %" if history.kind.percent else ", nats" if history.kind.section == "divergence" else ""
    better = {"higher": " (lower is better)", "lower": " (higher is better)", None: ""}[history.kind.worse]
    return canvas.picture(
        frame.width,
        frame.height,
        f"{wording.label(history.kind)} over reports",
        "; ".join(_hint(history, name, step) for name, steps in history.steps.items() for step in steps[-1:]),
        canvas.left_axis(frame, y, f"{wording.label(history.kind)}{percent}{better}", wording.plain),
        *_dates(history, where, frame),
        canvas.border(frame),
        *series,
    )


def _drawn(history: History, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Those that have a place on the axis, which is logarithmic for divergences."""
    kind = history.kind
    if kind.section != "divergence":
        return steps
    found = [(step, step.found.figure) for step in steps]
    return tuple(step for step, each in found if each.value > 0 and not wording.is_below_floor(kind, each))


def _scale(history: History, drawn: dict[str, tuple[Step, ...]], inner: Box) -> Scale:
    figures = [step.found.figure for steps in drawn.values() for step in steps]
    ends = [
        _value(history, end)
        for each in figures
        for end in (each.value, each.low, each.high)
        if end is not None
    ]
    make = logarithmic if history.kind.section == "divergence" else linear
    return make(ends, inner.bottom, inner.top)


def _lines(index: int, steps: Sequence[Step], points: list[tuple[float, float]]) -> list[Markup]:
    """Through the points, broken before each that cannot be compared with the one before it."""
    runs: list[list[tuple[float, float]]] = []
    for step, point in zip(steps, points, strict=True):
        if not runs or step.change.startswith("other"):
            runs.append([])
        runs[-1].append(point)
    return [canvas.path(run, f"trace s{index % canvas.SERIES}") for run in runs if len(run) > 1]


def _mark(
    index: int, history: History, name: str, step: Step, point: tuple[float, float], y: Scale
) -> Markup:
    low, high = step.found.figure.low, step.found.figure.high
    ends = (y(_value(history, low)), y(_value(history, high))) if low is not None and high is not None else ()
    whisker = (
        [canvas.line(point[0], ends[0], point[0], ends[1], f"whisker s{index % canvas.SERIES}")]
        if ends
        else []
    )
    return canvas.group(*whisker, canvas.marker(index, *point, 5.0, canvas.hint(_hint(history, name, step))))


def _dates(history: History, where: list[float], frame: Frame) -> list[Markup]:
    """Date and version under each report; those that would touch the ones before are left out."""
    inner, free_from = frame.inner, float("-inf")
    parts = []
    for x, report in zip(where, history.reports, strict=True):
        lines = (report.date, shortened(report.version, 12))
        half = max(text_width(line, canvas.FONT) for line in lines) / 2
        parts.append(canvas.line(x, inner.top, x, inner.bottom, "grid"))
        middle = max(x, half)
        if middle - half >= free_from:
            parts += [
                canvas.text(line, middle, inner.bottom + 18 + 16 * i, anchor="middle", class_="tick")
                for i, line in enumerate(lines)
            ]
            free_from = middle + half + 6
    return parts


def _value(history: History, value: float) -> float:
    return 100 * value if history.kind.percent else value


def _hint(history: History, name: str, step: Step) -> str:
    value, interval = wording.value_and_interval(history.kind.key, step.found.figure)
    between = f" ({interval})" if interval else ""
    return f"{name}, {step.report.date}, {step.report.version}: {value}{between} {step.change}".rstrip()
