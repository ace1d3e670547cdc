"""``report.md``: the verdict first, short enough for a CI step's summary or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import FIGURES, Evaluation, Figure
from bamba_quant.printable import printable
from bamba_quant.report import task_rows, wording
from bamba_quant.report.remedies import remedy, worst_tensors
from bamba_quant.report.tables import base_perplexity, column_styles
from bamba_quant.report.verdict import verdict

_SIGNS = {"pass": "✅ ", "fail": "❌ ", "none": ""}
# What Markdown, its tables and the HTML inside it would take for markup: also addresses, which become links, and
# :names: of emoji; but not the underscores inside a name, which mean nothing.
_MARKS = re.compile(r"([\\`*{}\[\]()<>#+!|~$&@]|(?<![^\W_])_|_(?![^\W_])|:(?=//|[\w+-]+:)|(?<=\bwww)\.)")
_FEW_GATES = 6


def to_markdown(evaluation: Evaluation) -> str:
    """GitHub's Markdown; markup in names is escaped."""
    evaluation = wording.by_size(evaluation)
    parts = [
        _heading(evaluation),
        _gates(evaluation),
        _figures(evaluation),
        _tasks(evaluation),
        _worst(evaluation),
        _drift(evaluation),
        _repeat(evaluation),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def literal(text: str) -> str:
    """``text`` so that it shows as it is, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(printable(text).split()))


def cell_code(text: str) -> str:
    """``text`` as code inside a table, where a fence of backticks would not hide the bars."""
    return f"<code>{literal(text)}</code>"


def code(text: str) -> str:
    """``text`` as code outside tables: fenced by more backticks than it holds in a row."""
    line = " ".join(printable(text).split())
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table of cells that are Markdown already; columns after the first ``words`` are flush right."""
    rules = [":--" if i < words else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


def _heading(evaluation: Evaluation) -> str:
    found = verdict(evaluation)
    text = evaluation.text
    sentences = "\n".join(f"- {literal(sentence)}" for sentence in found.sentences)
    return (
        f"## {_SIGNS[found.state]}{literal(found.headline)}\n\n{sentences}\n\n"
        f"{literal(', '.join(wording.short_names(evaluation)))} against {literal(evaluation.base.label)}: "
        f"{text.scored:,} tokens of {literal(text.file)} in {text.chunks} chunks of {text.ctx}; "
        "95 % intervals by paired bootstrap over chunks."
    )


def _gates(evaluation: Evaluation) -> str:
    """The gates that failed, and all of them folded away; all in full view where they are few."""
    rows = [
        (
            gate.passed,
            (
                literal(name),
                "✅ pass" if gate.passed else f"❌ **{wording.gate_word(gate)}**",
                literal(wording.gate_condition(gate)),
                literal(wording.gate_finding(gate, candidate)),
            ),
        )
        for name, candidate in wording.named_candidates(evaluation)
        for gate in candidate.gates
    ]
    header = ("candidate", "verdict", "gate", "tested")
    failed = [row for passed, row in rows if not passed]
    everything = table(header, failed + [row for passed, row in rows if passed], words=4)
    if len(rows) <= _FEW_GATES:
        return everything if rows else ""
    parts = [table(header, failed, words=4)] if failed else []
    return "\n\n".join([*parts, _folded(f"All {len(rows)} gates", everything)])


def _figures(evaluation: Evaluation) -> str:
    return f"### Figures\n\n{figures_table(evaluation)}"


def figures_table(evaluation: Evaluation, figures: Sequence[str] = tuple(wording.LEADING)) -> str:
    """The base's row and one a candidate with some of the figures that lead, and what the noise floor is."""
    names = (literal(wording.LEADING[key]) for key in figures)
    header = ("file", "size", *names, "bits/weight")
    styles, base = column_styles(evaluation), evaluation.base
    own = _with_interval("ppl_base", base_perplexity(evaluation), styles["ppl"])
    rows = [
        (
            f"{literal(base.label)} (base)",
            "–" if base.kind == "logits" else wording.size(base.file_bytes),
            *(own if key == "ppl" else "–" for key in figures),
            _bits(base),
        ),
        *(
            (
                f"**{literal(name)}**",
                wording.size(candidate.model.file_bytes),
                *(_with_interval(key, candidate.figures[key], styles[key]) for key in figures),
                _bits(candidate.model),
            )
            for name, candidate in wording.named_candidates(evaluation)
        ),
    ]
    floor = evaluation.noise_floor
    if floor is not None:
        found = (wording.floor(FIGURES[key], floor.figures.get(key)) or "–" for key in figures)
        rows.append(("noise floor", "", *found, ""))
    note = f"Noise floor: {literal(floor.path)}." if floor else "No noise floor was measured."
    return f"{table(header, rows)}\n\n{note}"


def _bits(model: ModelFile) -> str:
    return "–" if model.bits_per_weight is None else f"{model.bits_per_weight:.2f}"


def _with_interval(key: str, figure: Figure, column: wording.Style) -> str:
    value, interval = wording.value_and_interval(key, figure, column)
    return f"{value}<br><sub>{interval}</sub>" if interval else value


def _tasks(evaluation: Evaluation) -> str:
    rows = [[literal(cell) for cell in row] for row in task_rows.rows(evaluation)]
    return (
        f"### Tasks\n\n{table(task_rows.HEADER, rows, words=2)}\n\n{literal(task_rows.NOTE)}" if rows else ""
    )


def _worst(evaluation: Evaluation) -> str:
    rows = []
    for name, candidate in wording.named_candidates(evaluation):
        for tensor in worst_tensors(candidate):
            rows.append(
                (
                    literal(name),
                    cell_code(tensor.stored_name),
                    literal(tensor.format),
                    wording.decibels(tensor.output_sqnr),
                    wording.decibels(tensor.weight_sqnr),
                )
            )
    if not rows:
        return ""
    header = ("candidate", "tensor", "stored as", "output SQNR, dB", "weight SQNR, dB")
    mended = [
        f"- {literal(name)}: {code(wording.shortened_command(found.command))}"
        for name, candidate in wording.named_candidates(evaluation)
        if (found := remedy(evaluation, candidate))
    ]
    remedies = ["To store them with more bits:", "\n".join(mended)] if mended else []
    return _folded("Worst tensors", "\n\n".join((table(header, rows, words=3), *remedies)))


def _drift(evaluation: Evaluation) -> str:
    """The layer where each candidate's own loss is greatest, and what has gathered at the end."""
    rows = []
    for name, candidate in wording.named_candidates(evaluation):
        lossy = [layer for layer in candidate.layers if layer.local is not None]
        if lossy:
            least = min(lossy, key=lambda layer: layer.local or 0.0)
            last = candidate.layers[-1].accumulated
            rows.append(
                (
                    literal(name),
                    f"{least.layer} ({literal(least.kind)})",
                    wording.decibels(least.local),
                    wording.decibels(last),
                )
            )
    if not rows:
        return ""
    header = ("candidate", "worst layer", "its own SNR, dB", "SNR after the last layer, dB")
    return _folded("Drift of activations", table(header, rows, words=2))


def _repeat(evaluation: Evaluation) -> str:
    run = evaluation.run
    models = (evaluation.base, *(candidate.model for candidate in evaluation.candidates))
    listed = [
        f"- text {literal(evaluation.text.file)}, SHA-256 {code(evaluation.text.sha256)}",
        f"- seed {run.seed}, {run.resamples:,} resamples",
        f"- {literal(f'{run.processor}, {run.device}, {run.threads} threads, {run.backend}, {run.dtype}')}",
        f"- {literal(', '.join(f'{name} {version}' for name, version in run.versions.items()))}",
        *(f"- {literal(f'{model.label}: {model.tuned.line()}')}" for model in models if model.tuned),
        *(
            f"- {literal(file.name)} of {literal(model.label)}: {code(file.sha256)}"
            for model in models
            for file in model.files
        ),
    ]  # fmt: skip
    return _folded("Run it again", code(wording.shortened_command(run.command)) + "\n\n" + "\n".join(listed))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"
