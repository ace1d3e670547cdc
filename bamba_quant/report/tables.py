"""The report's tables in HTML: complete without a script, and sortable with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, Gate
from bamba_quant.report import task_rows, wording
from bamba_quant.report.frontier import standings
from bamba_quant.report.markup import Markup, breakable, element, joined, unbroken
from bamba_quant.report.remedies import worst_tensors
from bamba_quant.report.verdict import standing_words

_SHORT = 16  # characters of a name that is not worth breaking into lines


@dataclass(frozen=True)
class TableCell:
    """A cell: its text, a smaller text below, and the number it sorts by; ``words`` are flush left."""

    text: str
    below: str | None = None
    value: float | None = None
    words: bool = False


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[TableCell]],
    *,
    first: Sequence[TableCell] = (),
    foot: Sequence[TableCell] = (),
    sortable: bool = True,
    class_: str = "",
) -> Markup:
    """A table that scrolls sideways in a box of its own; a row's first cell is its heading.

    Columns are flush left where their cells are words. ``first`` and ``foot`` are rows that sorting leaves in place.
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
        element("tbody", _row(first)) if first else Markup(),
        element("tbody", *body),
        element("tfoot", _row(foot)) if foot else Markup(),
        class_=" ".join(name for name in ("sortable" if sortable else "", class_) if name) or None,
        aria_label=caption,
    )
    return joined(
        (
            element("p", unbroken(caption), class_="caption"),
            element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption),
        )
    )


def summary(evaluation: Evaluation) -> Markup:
    """The base's row and one a candidate with the figures that lead, each over its interval.

    Its columns are in the order of what matters: page.css leaves out the last ones where the screen is narrow.
    """
    styles, names = column_styles(evaluation), wording.short_names(evaluation)
    rows = [
        [
            TableCell(name, standing_words(standing, names), words=True),
            TableCell(wording.size(candidate.model.file_bytes), value=candidate.model.file_bytes),
            *(_figure(key, candidate.figures[key], styles[key]) for key in wording.LEADING),
            _bits(candidate.model),
        ]
        for name, candidate, standing in zip(names, evaluation.candidates, standings(evaluation), strict=True)
    ]
    base, none = evaluation.base, TableCell("–")
    first = [
        TableCell(base.label, "base", words=True),
        none if base.kind == "logits" else TableCell(wording.size(base.file_bytes)),
        *(
            _figure("ppl_base", base_perplexity(evaluation), styles["ppl"]) if key == "ppl" else none
            for key in wording.LEADING
        ),
        _bits(base),
    ]
    floors = (TableCell(_floor(evaluation, key)) for key in wording.LEADING)
    foot = [TableCell("noise floor", words=True), TableCell(""), *floors, TableCell("")]
    return table(
        "Each file against the base, the smallest first, with 95 % intervals",
        ("file", "size", *wording.LEADING.values(), "bits per weight"),
        rows,
        first=first,
        foot=foot if evaluation.noise_floor else (),
        class_="summary",
    )


def base_perplexity(evaluation: Evaluation) -> Figure:
    """The base's own, which every candidate has beside its figures."""
    return evaluation.candidates[0].figures["ppl_base"]


def column_styles(evaluation: Evaluation) -> dict[str, wording.Style]:
    """For each figure the decimals that all candidates have alike, and the base's perplexity too."""
    found = {}
    for key, kind in FIGURES.items():
        figures = [candidate.figures[key] for candidate in evaluation.candidates if key in candidate.figures]
        found[key] = wording.column_style(
            kind, [*figures, base_perplexity(evaluation)] if key == "ppl" else figures
        )
    return found


def tasks(evaluation: Evaluation) -> Markup:
    """A row a metric and model; empty without tasks."""
    rows = [
        [TableCell(cell, words=column in (0, 1, 3)) for column, cell in enumerate(row)]
        for row in task_rows.rows(evaluation)
    ]
    return table(task_rows.NOTE, task_rows.HEADER, rows, sortable=False) if rows else Markup()


def gates(caption: str, found: Sequence[tuple[str, Candidate, Gate]]) -> Markup:
    """One row a gate; gates that failed come first."""
    rows = [
        [
            TableCell(name, words=True),
            TableCell(
                f"{'✓' if gate.passed else '✗'} {wording.gate_word(gate)}",
                value=float(gate.passed),
                words=True,
            ),
            TableCell(wording.gate_condition(gate), wording.gate_finding(gate, candidate), words=True),
            _figure(gate.figure, candidate.figures[gate.figure]),
            TableCell(wording.floor(FIGURES[gate.figure], gate.floor) or "–", value=gate.floor),
        ]
        for name, candidate, gate in sorted(found, key=lambda entry: entry[2].passed)
    ]
    header = ("candidate", "verdict", "gate", "figure", "noise floor")
    return table(caption, header, rows, class_="gates")


def all_figures(evaluation: Evaluation) -> Markup:
    """Every figure under llama-perplexity's name, a column a candidate."""
    styles = column_styles(evaluation)
    rows = [
        [
            TableCell(wording.figure_label(key), words=True),
            *(_figure(key, candidate.figures[key], styles[key]) for candidate in evaluation.candidates),
            TableCell(_floor(evaluation, key)),
        ]
        for key in FIGURES
        if all(key in candidate.figures for candidate in evaluation.candidates)
    ]
    header = ("figure", *wording.short_names(evaluation), "noise floor")
    return table("All figures, by llama-perplexity's definitions and names", header, rows, sortable=False)


def worst(candidate: Candidate) -> Markup:
    """The tensors that lost most, as a short list, by the names that the file itself gives them."""
    return element(
        "ol",
        *(
            element(
                "li",
                element("code", tensor.stored_name),
                element(
                    "span", f" {tensor.format}, {wording.decibels(tensor.output_sqnr)} dB", class_="stored"
                ),
            )
            for tensor in worst_tensors(candidate)
        ),
        class_="worst",
    )


def tensors(name: str, candidate: Candidate) -> Markup:
    """Every tensor of one candidate."""
    rows = []
    for tensor in candidate.tensors:
        rows.append(
            [
                TableCell(tensor.stored_name, words=True),
                TableCell("" if tensor.layer is None else str(tensor.layer), value=tensor.layer),
                TableCell(tensor.role, words=True),
                TableCell(tensor.format, words=True),
                TableCell("×".join(map(str, tensor.shape)), value=math.prod(tensor.shape)),
                TableCell(wording.size(tensor.n_bytes), value=tensor.n_bytes),
                _decibels(tensor.weight_sqnr),
                _decibels(tensor.output_sqnr, none="–"),
                TableCell(wording.digits(tensor.max_error, 3), value=tensor.max_error),
            ]
        )
    header = (
        *("tensor", "layer", "role", "stored as", "shape", "size"),
        *("weight SQNR, dB", "output SQNR, dB", "greatest error"),
    )
    return table(f"All tensors of {name}", header, rows)


def hashes(evaluation: Evaluation) -> Markup:
    """Every file of base and candidates."""
    rows = [
        [
            TableCell(file.name, words=True),
            TableCell(model.label, words=True),
            TableCell(f"{file.n_bytes:,}", value=file.n_bytes),
            TableCell(file.sha256, words=True),
        ]
        for model in (evaluation.base, *(candidate.model for candidate in evaluation.candidates))
        for file in model.files
    ]
    return table("Files", ("file", "model", "bytes", "SHA-256"), rows) if rows else Markup()


def _figure(key: str, figure: Figure, column: wording.Style | None = None) -> TableCell:
    return TableCell(*wording.value_and_interval(key, figure, column), figure.value)


def _floor(evaluation: Evaluation, key: str) -> str:
    floor = evaluation.noise_floor
    return (wording.floor(FIGURES[key], floor.figures.get(key)) if floor else None) or "–"


def _bits(model: ModelFile) -> TableCell:
    bits = model.bits_per_weight
    return TableCell("–") if bits is None else TableCell(f"{bits:.2f}", value=bits)


def _decibels(value: float | None, none: str = "exact") -> TableCell:
    # What is exact sorts above every number.
    return TableCell(
        none if value is None else wording.decibels(value), value=1e9 if value is None else value
    )


def _row(cells: Sequence[TableCell]) -> Markup:
    return element("tr", *(_cell(cell, column == 0) for column, cell in enumerate(cells)))


def _cell(entry: TableCell, heading: bool) -> Markup:
    below = element("span", unbroken(entry.below), class_="range") if entry.below else Markup()
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
