"""The report's tables in HTML: complete without a script, and sortable with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, Gate
from bamba_quant.report import numbers
from bamba_quant.report.markup import Markup, breakable, element, joined, unbroken
from bamba_quant.report.view import (
    LEADING,
    cell,
    figure_label,
    gate_condition,
    gate_finding,
    gate_word,
    short_names,
)

_SHORT = 16  # characters of a name that is not worth breaking into lines


@dataclass(frozen=True)
class Cell:
    """What a cell says, what stands small below it, and the number it sorts by."""

    text: str
    below: str | None = None
    value: float | None = None
    words: bool = False


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    foot: Sequence[Cell] = (),
    sortable: bool = True,
) -> Markup:
    """A table that scrolls sideways in a box of its own; a row's first cell is its heading.

    Columns are flush left where their cells are words. ``foot`` is a row that sorting leaves below.
    """
    words = [all(row[i].words for row in rows) for i in range(len(header))]
    head = element(
        "tr",
        *(
            element("th", name, scope="col", class_="words" if left else None)
            for name, left in zip(header, words, strict=True)
        ),
    )
    body = [_row(row) for row in rows]
    inner = element(
        "table",
        element("thead", head),
        element("tbody", *body),
        element("tfoot", _row(foot)) if foot else Markup(),
        class_="sortable" if sortable else None,
        aria_label=caption,
    )
    return joined(
        (
            element("p", caption, class_="caption"),
            element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption),
        )
    )


def summary(evaluation: Evaluation) -> Markup:
    """A row a candidate with the figures that lead, each over its interval."""
    rows = [
        [
            Cell(name, words=True),
            Cell(numbers.size(candidate.model.file_bytes), value=candidate.model.file_bytes),
            _bits(candidate),
            *(_figure(key, candidate.figures[key]) for key in LEADING),
        ]
        for name, candidate in zip(short_names(evaluation), evaluation.candidates, strict=True)
    ]
    foot = (
        [
            Cell("noise floor", words=True),
            Cell(""),
            Cell(""),
            *(Cell(_floor(evaluation, key)) for key in LEADING),
        ]
        if evaluation.noise_floor
        else []
    )
    header = ("candidate", "file size", "bits per weight", *LEADING.values())
    return table("Each candidate against the base, with 95 % intervals", header, rows, foot=foot)


def gates(caption: str, found: Sequence[tuple[str, Candidate, Gate]]) -> Markup:
    """A row a gate, those that failed first."""
    rows = [
        [
            Cell(name, words=True),
            Cell(f"{'✓' if gate.passed else '✗'} {gate_word(gate)}", value=float(gate.passed), words=True),
            Cell(gate_condition(gate), words=True),
            Cell(gate_finding(gate, candidate), words=True),
            _figure(gate.figure, candidate.figures[gate.figure]),
            Cell(numbers.floor(FIGURES[gate.figure], gate.floor) or "–", value=gate.floor),
        ]
        for name, candidate, gate in sorted(found, key=lambda entry: entry[2].passed)
    ]
    header = ("candidate", "verdict", "gate", "tested", "figure", "noise floor")
    return table(caption, header, rows)


def all_figures(evaluation: Evaluation) -> Markup:
    """Every figure under llama-perplexity's name, a column a candidate."""
    rows = [
        [
            Cell(figure_label(key), words=True),
            *(_figure(key, candidate.figures[key], sorted_by=False) for candidate in evaluation.candidates),
            Cell(_floor(evaluation, key)),
        ]
        for key in FIGURES
        if all(key in candidate.figures for candidate in evaluation.candidates)
    ]
    header = ("figure", *short_names(evaluation), "noise floor")
    return table("All figures, by llama-perplexity's definitions and names", header, rows, sortable=False)


def worst(candidate: Candidate) -> Markup:
    """The tensors that lost most, as a short list."""
    known = {tensor.name: tensor for tensor in candidate.tensors}
    return element(
        "ol",
        *(
            element(
                "li",
                element("code", tensor.name),
                element(
                    "span", f" {tensor.format}, {numbers.decibels(tensor.output_sqnr)} dB", class_="stored"
                ),
            )
            for tensor in (known[name] for name in candidate.worst if name in known)
        ),
        class_="worst",
    )


def tensors(name: str, candidate: Candidate) -> Markup:
    """Every tensor of one candidate."""
    rows = []
    for tensor in candidate.tensors:
        rows.append(
            [
                Cell(tensor.name, words=True),
                Cell("" if tensor.layer is None else str(tensor.layer), value=tensor.layer),
                Cell(tensor.role, words=True),
                Cell(tensor.format, words=True),
                Cell("×".join(map(str, tensor.shape)), value=_product(tensor.shape)),
                Cell(numbers.size(tensor.n_bytes), value=tensor.n_bytes),
                _decibels(tensor.weight_sqnr),
                _decibels(tensor.output_sqnr, none="–"),
                Cell(numbers.digits(tensor.max_error, 3), value=tensor.max_error),
            ]
        )
    header = (
        *("tensor", "layer", "role", "stored as", "shape", "size"),
        *("weight SQNR, dB", "output SQNR, dB", "greatest error"),
    )
    return table(f"All tensors of {name}", header, rows)


def _figure(key: str, figure: Figure, *, sorted_by: bool = True) -> Cell:
    text, below = cell(key, figure)
    return Cell(text, below, figure.value if sorted_by else None)


def _floor(evaluation: Evaluation, key: str) -> str:
    floor = evaluation.noise_floor
    return (numbers.floor(FIGURES[key], floor.figures.get(key)) if floor else None) or "–"


def _bits(candidate: Candidate) -> Cell:
    bits = candidate.model.bits_per_weight
    return Cell("–") if bits is None else Cell(f"{bits:.2f}", value=bits)


def _decibels(value: float | None, none: str = "exact") -> Cell:
    # What is exact sorts above every number.
    return Cell(none if value is None else numbers.decibels(value), value=1e9 if value is None else value)


def _product(shape: Sequence[int]) -> int:
    elements = 1
    for extent in shape:
        elements *= extent
    return elements


def _row(cells: Sequence[Cell]) -> Markup:
    return element("tr", *(_cell(cell, column == 0) for column, cell in enumerate(cells)))


def _cell(entry: Cell, heading: bool) -> Markup:
    below = element("span", entry.below, class_="range") if entry.below else Markup()
    value = None if entry.value is None else repr(float(entry.value))
    verdict = {"✓": "pass", "✗": "fail"}.get(entry.text[:1]) if entry.words else None
    content = breakable(unbroken(entry.text) if entry.words else entry.text)
    if verdict:
        content = element("span", content, class_="word")
    short = "short" if entry.words and len(entry.text) <= _SHORT else None
    classes = " ".join(name for name in ("words" if entry.words else "number", verdict, short) if name)
    return element(
        "th" if heading else "td",
        joined((content, below)),
        class_=classes,
        scope="row" if heading else None,
        data_value=value,
    )
