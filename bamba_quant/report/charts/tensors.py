"""Which weights lost most: a cell for every tensor, and for the z, x, B, C and dt rows of ssm_in apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.evaluation.result import Candidate, Evaluation, TensorLoss
from bamba_quant.report.charts import canvas
from bamba_quant.report.labels import Box, shortened, text_width
from bamba_quant.report.markup import Markup
from bamba_quant.report.numbers import decibels, plain
from bamba_quant.report.scales import Scale

_WIDTH, _ROW, _NAMES, _TOP = 330.0, 19.0, 84.0, 4.0
_LONGEST_ROLE = 13
# From the colour map cividis (Nuñez, Anderton, Renslow 2018), which looks the same with and without colour
# blindness: dark is much loss, yellow little.
_CIVIDIS = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115),
    (138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One square: a tensor, or a class of its rows; ``sqnr`` in dB, None where nothing differs."""

    row: str
    layer: int | None
    sqnr: float | None
    words: str


def tensor_cells(candidate: Candidate) -> tuple[Cell, ...]:
    """The tensors that lost anything in some layer, with ssm_in's classes of rows in its place."""
    cells = [cell for tensor in candidate.tensors for cell in _cells(tensor)]
    lossy = {cell.row for cell in cells if cell.sqnr is not None}
    return tuple(cell for cell in cells if cell.row in lossy)


def sqnr_span(evaluation: Evaluation) -> tuple[float, float] | None:
    """Least and greatest decibels of all candidates, which share their colours; None when all is exact."""
    values = [
        cell.sqnr
        for candidate in evaluation.candidates
        for cell in tensor_cells(candidate)
        if cell.sqnr is not None
    ]
    return (min(values), max(values)) if values else None


def tensor_map(name: str, candidate: Candidate, span: tuple[float, float]) -> Markup:
    """One candidate's map: a row a role, a column a layer, the least signal to noise darkest."""
    cells = tensor_cells(candidate)
    rows = list(dict.fromkeys(cell.row for cell in cells))
    layers = sorted({tensor.layer for tensor in candidate.tensors if tensor.layer is not None}) or [0]
    step = (_WIDTH - _NAMES - 1) / len(layers)
    colour = _Colours(*span)
    foot = _TOP + _ROW * len(rows)
    worst = min((cell for cell in cells if cell.sqnr is not None), key=lambda c: c.sqnr or 0.0, default=None)
    return canvas.picture(
        _WIDTH,
        foot + 38,
        f"Signal to quantization noise of weights, {name}",
        f"{len(rows)} kinds of rows by {len(layers)} layers; " + (f"lowest: {worst.words}" if worst else "all exact"),
        *(
            canvas.text(
                shortened(row, _LONGEST_ROLE), _NAMES - 8, _TOP + _ROW * i + 14, anchor="end", class_="small"
            )
            for i, row in enumerate(rows)
        ),
        *(
            _square(cell, rows.index(cell.row), layers, step, colour)
            for cell in cells
        ),
        *_layer_numbers(layers, step, foot),
    )  # fmt: skip


def colour_key(span: tuple[float, float]) -> Markup:
    """The colours of ``tensor_map`` with their decibels."""
    width, scale, colour = 260.0, Scale(*_widened(span), 8.0, 252.0), _Colours(*span)
    pieces = 40
    bars = [
        canvas.rectangle(
            Box(8 + 244 * i / pieces, 4, 8 + 244 * (i + 1) / pieces + 0.4, 16),
            "swatch",
            fill=colour(scale.low + (i + 0.5) / pieces * (scale.high - scale.low))[0],
        )
        for i in range(pieces)
    ]
    ticks = [
        canvas.text(f"{plain(value)} dB", scale(value), 30, anchor="middle", class_="tick")
        for value in scale.ticks(5)
    ]
    return canvas.picture(
        width, 36, "Colours", f"{plain(round(scale.low))} dB is darkest, {plain(round(scale.high))} dB lightest",
        *bars, *ticks,
    )  # fmt: skip


class _Colours:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = _widened((low, high))

    def __call__(self, sqnr: float) -> tuple[str, str]:
        """A fill, and the class of the writing that can be read on it."""
        place = (
            (min(max(sqnr, self.low), self.high) - self.low) / (self.high - self.low) * (len(_CIVIDIS) - 1)
        )
        first = min(int(place), len(_CIVIDIS) - 2)
        rgb = [
            a + (b - a) * (place - first) for a, b in zip(_CIVIDIS[first], _CIVIDIS[first + 1], strict=True)
        ]
        bright = sum(
            weight * _linear(part / 255) for weight, part in zip((0.2126, 0.7152, 0.0722), rgb, strict=True)
        )
        # Where black and white can be told from it equally well (WCAG 2.2, relative luminance).
        writing = "on-light" if (bright + 0.05) ** 2 > 1.05 * 0.05 else "on-dark"
        return "#" + "".join(f"{round(part):02x}" for part in rgb), writing


def _linear(part: float) -> float:
    """A share of a colour in sRGB as a share of light."""
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def _widened(span: tuple[float, float]) -> tuple[float, float]:
    return span if span[1] - span[0] >= 1 else (span[0] - 0.5, span[0] + 0.5)


def _cells(tensor: TensorLoss) -> list[Cell]:
    if not tensor.row_classes:
        words = f"{tensor.name} ({tensor.format}): {_decibels(tensor.weight_sqnr)}"
        return [Cell(tensor.role, tensor.layer, tensor.weight_sqnr, words)]
    return [
        Cell(
            f"{tensor.role}.{rows.name}",
            tensor.layer,
            rows.weight_sqnr,
            f"{tensor.name} ({tensor.format}), {rows.rows} rows of {rows.name}: {_decibels(rows.weight_sqnr)}",
        )
        for rows in tensor.row_classes
    ]


def _square(cell: Cell, row: int, layers: Sequence[int], step: float, colour: _Colours) -> Markup:
    left, width = _NAMES, step * len(layers)
    if cell.layer is not None:
        left, width = _NAMES + step * layers.index(cell.layer), step
    top = _TOP + _ROW * row
    box = Box(left, top, left + width, top + _ROW)
    if cell.sqnr is None:
        return canvas.rectangle(box, "cell exact", canvas.hint(cell.words))
    fill, writing = colour(cell.sqnr)
    square = canvas.rectangle(box, "cell", canvas.hint(cell.words), fill=fill)
    number = f"{cell.sqnr:.0f}"
    if text_width(number, 11) > width - 2:
        return square
    return canvas.group(
        square, canvas.text(number, left + width / 2, top + 13.5, anchor="middle", class_=f"small {writing}")
    )


def _layer_numbers(layers: Sequence[int], step: float, foot: float) -> list[Markup]:
    """Numbers under the columns, as many as there is room for."""
    every = 1
    while step * every < text_width(str(layers[-1]), 12) + 3:
        every *= 2
    centre = _NAMES + step * len(layers) / 2
    return [
        *(
            canvas.text(str(layer), _NAMES + step * (i + 0.5), foot + 15, anchor="middle", class_="tick")
            for i, layer in enumerate(layers)
            if i % every == 0
        ),
        canvas.text("layer", centre, foot + 31, anchor="middle", class_="name"),
    ]


def _decibels(sqnr: float | None) -> str:
    return "exact" if sqnr is None else f"{decibels(sqnr)} dB"
