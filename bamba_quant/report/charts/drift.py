"""Where along the layers activations leave the base's: what each layer adds, and what has gathered by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bamba_quant.evaluation.result import Candidate, Evaluation, LayerDrift
from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.canvas import Frame
from bamba_quant.report.charts.layout import Box, Scale, linear
from bamba_quant.report.markup import Markup
from bamba_quant.report.wording import decibels, plain
from bamba_reference.config import has_attention

_WIDTH, _HEIGHT = 330.0, 220.0
_MOST_MARKED = 24  # layers; beyond these the marks would touch, and only answer the pointer


def drift_scale(evaluation: Evaluation) -> tuple[float, float] | None:
    """Least and greatest decibels of all candidates, which share an axis; None when nothing drifted."""
    values = [
        value
        for candidate in evaluation.candidates
        for layer in candidate.layers
        for value in (layer.local, layer.accumulated)
        if value is not None
    ]
    return (min(values), max(values)) if values else None


def layer_drift(name: str, candidate: Candidate, kind: int, span: tuple[float, float]) -> Markup:
    """One candidate's panel: accumulated drift as a full line with filled marks, local drift dashed and hollow."""
    frame = Frame(_WIDTH, _HEIGHT, left=34, right=8, top=30, bottom=40)
    inner, layers = frame.inner, candidate.layers
    y = linear(span, inner.bottom, inner.top, most=5)
    step = (inner.right - inner.left) / len(layers)

    def centre(index: int) -> float:
        return inner.left + (index + 0.5) * step

    least = min((layer for layer in layers if layer.accumulated is not None), key=_accumulated, default=None)
    lowest = (
        f"lowest accumulated {decibels(least.accumulated)} dB at layer {least.layer}" if least else "exact"
    )
    x = Scale(layers[0].layer - 0.5, layers[-1].layer + 0.5, inner.left, inner.right)
    return canvas.picture(
        _WIDTH,
        _HEIGHT,
        f"Drift of activations by layer, {name}",
        f"{len(layers)} layers, {lowest}; attention layers: {_attention(layers)}",
        *(_band(inner, centre(i), step) for i, layer in enumerate(layers) if has_attention(layer.kind)),
        canvas.bottom_axis(frame, _whole(x), "layer", plain, most=8),
        canvas.left_axis(frame, y, "signal to noise, dB", plain, most=5),
        canvas.border(frame),
        *_trace(layers, lambda layer: layer.local, centre, y, kind, "local"),
        *_trace(layers, lambda layer: layer.accumulated, centre, y, kind, "accumulated"),
    )


def _trace(
    layers: Sequence[LayerDrift],
    value: Callable[[LayerDrift], float | None],
    centre: Callable[[int], float],
    y: Scale,
    kind: int,
    what: str,
) -> list[Markup]:
    """A line through the layers that differ, broken where one does not, and a mark at each."""
    local = what == "local"
    runs: list[list[tuple[float, float]]] = [[]]
    marks = []
    for index, layer in enumerate(layers):
        found = value(layer)
        if found is None:
            runs.append([])
            continue
        point = (centre(index), y(found))
        runs[-1].append(point)
        words = f"layer {layer.layer} ({layer.kind}), {what}: {decibels(found)} dB"
        look = "spot" if len(layers) > _MOST_MARKED else "hollow" if local else "mark"
        marks.append(canvas.marker(kind, *point, 3.5, canvas.hint(words), class_=look))
    colour = f"trace s{kind % canvas.SERIES}" + (" dashed" if local else "")
    return [canvas.path(run, colour) for run in runs if len(run) > 1] + marks


def _band(inner: Box, centre: float, step: float) -> Markup:
    return canvas.rectangle(Box(centre - step / 2, inner.top, centre + step / 2, inner.bottom), "band")


class _Whole(Scale):
    def ticks(self, most: int) -> tuple[float, ...]:
        return tuple(value for value in super().ticks(most) if value == int(value))


def _whole(scale: Scale) -> Scale:
    return _Whole(scale.low, scale.high, scale.start, scale.end)


def _accumulated(layer: LayerDrift) -> float:
    return float("inf") if layer.accumulated is None else layer.accumulated


def _attention(layers: Sequence[LayerDrift]) -> str:
    return ", ".join(str(layer.layer) for layer in layers if has_attention(layer.kind)) or "none"
