"""Which tensors of a file lost most: a cell for each, and for the z, x, B, C and dt rows of ssm_in apart.

A cell is the output's signal to noise where the tensor is a matrix of a layer, which weighs every error by what
passes through it, and the weights' own elsewhere. All maps of a report have one scale of colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.evaluation.result import Candidate, Evaluation, TensorLoss
from bamba_quant.report.charts import canvas
from bamba_quant.report.charts.layout import Box, shortened, text_width
from bamba_quant.report.markup import Markup
from bamba_quant.report.wording import decibels

_WIDTH, _ROW, _NAMES, _TOP = 330.0, 19.0, 84.0, 4.0
_LONGEST_ROLE = 13
_LEAST_SPAN = 4.0  # decibels; less is scatter and should not look like a pattern
# From the colour map cividis (Nuñez, Anderton, Renslow 2018), which looks the same with and without colour
# blindness: dark is much loss, yellow little.
_CIVIDIS = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115),
    (138, 134, 120), (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip


@dataclass(frozen=True)
class TensorCell:
    """One square: a tensor, or a class of its rows; ``sqnr`` in dB, None where nothing differs."""

    row: str
    layer: int | None
    sqnr: float | None
    words: str


def tensor_cells(candidate: Candidate) -> tuple[TensorCell, ...]:
    """The tensors that lost anything in some layer, with ssm_in's classes of rows in its place."""
    cells = [cell for tensor in candidate.tensors for cell in _cells(tensor)]
    lossy = {cell.row for cell in cells if cell.sqnr is not None}
    return tuple(cell for cell in cells if cell.row in lossy)


def tensor_map(name: str, candidate: Candidate, colour: LossScale) -> Markup:
    """One candidate's map: a row a role, a column a layer, the least signal to noise darkest."""
    cells = tensor_cells(candidate)
    rows = list(dict.fromkeys(cell.row for cell in cells))
    layers = sorted({tensor.layer for tensor in candidate.tensors if tensor.layer is not None}) or [0]
    step = (_WIDTH - _NAMES - 1) / len(layers)
    foot = _TOP + _ROW * len(rows)
    worst = min((cell for cell in cells if cell.sqnr is not None), key=lambda c: c.sqnr or 0.0, default=None)
    return canvas.picture(
        _WIDTH,
        foot + 38,
        f"Signal to quantization noise of tensors, {name}",
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


def tensor_key(colour: LossScale) -> Markup:
    """The colours of all maps, from the least decibels to the greatest."""
    pieces, left, right, top = 24, _NAMES, _WIDTH - 52, 4.0
    step = (right - left) / pieces
    low, high = f"{colour.low:.0f} dB", f"{colour.high:.0f} dB"
    swatches = [
        canvas.rectangle(
            Box(left + step * i, top, left + step * (i + 1) + 0.4, top + 12),
            "swatch",
            fill=colour(colour.low + (i + 0.5) / pieces * (colour.high - colour.low))[0],
        )
        for i in range(pieces)
    ]
    return canvas.picture(
        _WIDTH,
        20,
        "Colours of the maps",
        f"from {low}, most lost, to {high}, least lost",
        canvas.text(low, left - 8, top + 10, anchor="end", class_="tick"),
        *swatches,
        canvas.text(high, right + 8, top + 10, class_="tick"),
    )


def loss_scale(evaluation: Evaluation) -> LossScale:
    """From the least to the greatest decibels of all candidates' tensors."""
    cells = (cell.sqnr for candidate in evaluation.candidates for cell in tensor_cells(candidate))
    found = [sqnr for sqnr in cells if sqnr is not None]
    return LossScale(min(found, default=0.0), max(found, default=0.0))


class LossScale:
    """Colours for decibels from ``low`` to ``high``."""

    def __init__(self, low: float, high: float) -> None:
        room = max(_LEAST_SPAN - (high - low), 0.0) / 2
        self.low, self.high = low - room, high + room

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


def _cells(tensor: TensorLoss) -> list[TensorCell]:
    parts = [(rows.name, rows.weight_sqnr, rows.output_sqnr) for rows in tensor.row_classes]
    return [
        TensorCell(
            f"{tensor.role}.{part}" if part else tensor.role,
            tensor.layer,
            weight if output is None else output,
            f"{tensor.name} ({tensor.format}){f', rows of {part}' if part else ''}: weights {_decibels(weight)}"
            + ("" if output is None else f", output {_decibels(output)}"),
        )
        for part, weight, output in parts or [("", tensor.weight_sqnr, tensor.output_sqnr)]
    ]


def _square(cell: TensorCell, row: int, layers: Sequence[int], step: float, colour: LossScale) -> Markup:
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
