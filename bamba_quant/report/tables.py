"""The report's tables in HTML: complete without a script, and sortable with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, Gate
from bamba_quant.report import wording
from bamba_quant.report.markup import Markup, breakable, element, escaped, joined, unbroken

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
    foot: Sequence[TableCell] = (),
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
            TableCell(name, words=True),
            TableCell(wording.size(candidate.model.file_bytes), value=candidate.model.file_bytes),
            _bits(candidate),
            *(_figure(key, candidate.figures[key]) for key in wording.LEADING),
        ]
        for name, candidate in wording.named_candidates(evaluation)
    ]
    floors = (TableCell(_floor(evaluation, key)) for key in wording.LEADING)
    foot = [TableCell("noise floor", words=True), TableCell(""), TableCell(""), *floors]
    header = ("candidate", "file size", "bits per weight", *wording.LEADING.values())
    return table(
        "Each candidate against the base, with 95 % intervals",
        header,
        rows,
        foot=foot if evaluation.noise_floor else (),
    )


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
            TableCell(wording.gate_condition(gate), words=True),
            TableCell(wording.gate_finding(gate, candidate), words=True),
            _figure(gate.figure, candidate.figures[gate.figure]),
            TableCell(wording.floor(FIGURES[gate.figure], gate.floor) or "–", value=gate.floor),
        ]
        for name, candidate, gate in sorted(found, key=lambda entry: entry[2].passed)
    ]
    header = ("candidate", "verdict", "gate", "tested", "figure", "noise floor")
    return table(caption, header, rows)


def all_figures(evaluation: Evaluation) -> Markup:
    """Every figure under llama-perplexity's name, a column a candidate."""
    rows = [
        [
            TableCell(wording.figure_label(key), words=True),
            *(_figure(key, candidate.figures[key], sorted_by=False) for candidate in evaluation.candidates),
            TableCell(_floor(evaluation, key)),
        ]
        for key in FIGURES
        if all(key in candidate.figures for candidate in evaluation.candidates)
    ]
    header = ("figure", *wording.short_names(evaluation), "noise floor")
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
                    "span", f" {tensor.format}, {wording.decibels(tensor.output_sqnr)} dB", class_="stored"
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
                TableCell(tensor.name, words=True),
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


def _figure(key: str, figure: Figure, *, sorted_by: bool = True) -> TableCell:
    text, below = wording.value_and_interval(key, figure)
    return TableCell(text, below, figure.value if sorted_by else None)


def _floor(evaluation: Evaluation, key: str) -> str:
    floor = evaluation.noise_floor
    return (wording.floor(FIGURES[key], floor.figures.get(key)) if floor else None) or "–"


def _bits(candidate: Candidate) -> TableCell:
    bits = candidate.model.bits_per_weight
    return TableCell("–") if bits is None else TableCell(f"{bits:.2f}", value=bits)


def _decibels(value: float | None, none: str = "exact") -> TableCell:
    # What is exact sorts above every number.
    return TableCell(
        none if value is None else wording.decibels(value), value=1e9 if value is None else value
    )


def _row(cells: Sequence[TableCell]) -> Markup:
    return element("tr", *(_cell(cell, column == 0) for column, cell in enumerate(cells)))


def _cell(entry: TableCell, heading: bool) -> Markup:
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


DEFINITIONS = (
    ("KLD", "Kullback-Leibler divergence of the candidate's next-token distribution from the base's, in nats."),
    ("PPL", "Perplexity: exp of the mean negative log-likelihood. The ratio to the base's is what was lost."),
    ("Same top p", "Share of tokens whose most probable continuation is the same."),
    ("Top-5 overlap", "Share of the base's five most probable continuations among the candidate's five."),
    ("Δp", "Change of the probability given to the token that really follows, candidate minus base."),
    ("Flips", "Share of tokens whose top guess turned from right to wrong or from wrong to right."),
    ("SQNR", "Signal to quantization noise: 10 log10(Σw² / Σ(ŵ−w)²), in decibels; 6 dB are about one bit."),
    (
        "Interval",
        "Tokens of one chunk depend on one another, so whole chunks are drawn, for base and candidate alike. Shares "
        "with exceptions in fewer than eight chunks, which most draws would miss, have exact binomial intervals.",
    ),
    ("Noise floor", "The base against itself by another path of computation; nothing smaller can be measured."),
    ("Gate", "A limit on the worse end of the one-sided 95 % interval: chance alone passes it in one of twenty runs."),
)  # fmt: skip


def definitions() -> Markup:
    return _terms([(term, escaped(meaning)) for term, meaning in DEFINITIONS])


def facts(evaluation: Evaluation) -> Markup:
    """Text, tokenizer, seed, device, versions and options."""
    text, run = evaluation.text, evaluation.run
    models = (evaluation.base, *(candidate.model for candidate in evaluation.candidates))
    listed = [
        ("base", f"{evaluation.base.path} ({evaluation.base.kind}, {evaluation.base.variant})"),
        *(
            ("candidate", f"{c.model.path} ({c.model.kind}, {c.model.variant}, {_types(c.model)})")
            for c in evaluation.candidates
        ),
        *((f"how {model.label} came about", model.tuned.line()) for model in models if model.tuned),
        ("text", f"{text.file}, {text.tokens:,} tokens"),
        ("text SHA-256", text.sha256),
        ("tokenizer SHA-256", text.tokenizer_sha256),
        ("seed", f"{run.seed}, {run.resamples:,} resamples"),
        ("computed on", f"{run.processor}, {run.device}, {run.threads} threads, {run.backend}, {run.dtype}"),
        ("started", run.started),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        (
            "options",
            ", ".join(f"{name}={value}" for name, value in run.options.items() if value is not None),
        ),
    ]
    return _terms([(term, escaped(value)) for term, value in listed])


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


def _types(model: ModelFile) -> str:
    return ", ".join(f"{total.name} {wording.size(total.n_bytes)}" for total in model.types)


def _terms(entries: list[tuple[str, Markup]]) -> Markup:
    return element(
        "dl",
        *(piece for term, value in entries for piece in (element("dt", term), element("dd", value))),
    )
