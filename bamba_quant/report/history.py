"""Several reports side by side: one figure of every file over the reports, in the order of their dates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bamba_quant.errors import join_names
from bamba_quant.evaluation.provenance import ModelFile, Run, Text
from bamba_quant.evaluation.result import FIGURES, Figure, FigureKind
from bamba_quant.report import wording
from bamba_quant.report.json_report import ReportError, from_plain, report_object

SCHEMAS = (3, 4, 5)  # which differ in nothing that is read here


@dataclass(frozen=True)
class Measured:
    """A file in one report."""

    model: ModelFile
    figure: Figure


@dataclass(frozen=True)
class PastReport:
    """What a history takes from a report; ``measured`` by the name that a file has in all reports."""

    path: Path
    run: Run
    text: Text
    base: ModelFile
    measured: Mapping[str, Measured]

    @property
    def version(self) -> str:
        """Of bamba-quant."""
        return self.run.versions.get("bamba-quant", "")

    @property
    def date(self) -> str:
        return self.run.started[:10]

    def differs(self, other: PastReport) -> str | None:
        """What keeps the figures of two reports from being compared, such as "text"; None where nothing does."""
        mine, theirs = _settings(self), _settings(other)
        return next((name for name in mine if mine[name] != theirs[name]), None)


@dataclass(frozen=True)
class Step:
    """One file in one report. ``change`` is against ``before``, the file in the last report before it that has it.

    It is "better" or "worse" ("higher" or "lower" for a figure that is neither) where the two 95 % intervals lie apart,
    by more than the noise floor; else "about the same". It is "other …" where the reports differ in more than the file,
    "no interval" where a figure has none, and empty in a file's first report.
    """

    report: PastReport
    found: Measured
    before: Measured | None
    change: str

    @property
    def comparable(self) -> bool:
        return self.change != "" and not self.change.startswith(("other", "no"))


@dataclass(frozen=True)
class History:
    """``steps`` by file, in the order of ``reports``, which is that of time; the smallest file is first."""

    kind: FigureKind
    reports: tuple[PastReport, ...]
    steps: Mapping[str, tuple[Step, ...]]


def read_history(paths: Sequence[Path], key: str = "kld_mean") -> History:
    """The history of the figure ``key`` in reports: files, or directories that hold a ``report.json``.

    Raises ``ReportError`` for a file that is not a report of schema 3, 4 or 5, and for an unknown figure.
    """
    if key not in FIGURES:
        near = join_names(get_close_matches(key, FIGURES, 5, 0.0))
        raise ReportError("an unknown figure", found=key, expected=f"a name of report.json, such as {near}")
    files = dict.fromkeys(_file(path).resolve() for path in paths)
    read = [(file, report_object(file, SCHEMAS)) for file in files]
    models = {file: _models(value, file) for file, value in read}
    # A file's variant is its name in all reports, or its label, as soon as one report has a variant twice.
    twice = any(
        count > 1 for found in models.values() for count in Counter(each.variant for each in found).values()
    )
    reports = sorted(
        (_report(file, value, models[file], key, twice) for file, value in read),
        key=lambda report: report.run.started,
    )
    names = {name: each.model.file_bytes for report in reports for name, each in report.measured.items()}
    ordered = sorted(names, key=names.__getitem__)
    return History(FIGURES[key], tuple(reports), {name: _steps(name, reports, key) for name in ordered})


def worse(history: History) -> list[tuple[str, Step]]:
    """The files of the newest report that are worse than before. Raises ``ReportError`` where none can be compared."""
    newest = history.reports[-1]
    steps = [
        (name, step)
        for name, found in history.steps.items()
        for step in found
        if step.report is newest and step.before
    ]
    apart = [f"{name}: {step.change}" for name, step in steps if not step.comparable]
    if history.kind.worse is None or not steps or apart:
        raise ReportError(
            "the newest report cannot be compared with the one before it",
            where=newest.path,
            found="a figure that is neither better nor worse when higher"
            if history.kind.worse is None
            else ", ".join(apart) or "no file that an earlier report has",
            fix="evaluate on the same text, base and settings each time, with eight chunks or more",
        )
    return [(name, step) for name, step in steps if step.change == "worse"]


def _file(path: Path) -> Path:
    return path / "report.json" if path.is_dir() else path


def _models(value: Mapping[str, Any], file: Path) -> list[ModelFile]:
    candidates = value.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise ReportError("the report has no candidates", where=file)
    return [
        from_plain(
            ModelFile, _field(each, "model", f"{file}.candidates[{i}]"), f"{file}.candidates[{i}].model"
        )
        for i, each in enumerate(candidates)
    ]


def _report(
    file: Path, value: Mapping[str, Any], models: Sequence[ModelFile], key: str, by_label: bool
) -> PastReport:
    measured = {}
    for i, (each, model) in enumerate(zip(value["candidates"], models, strict=True)):
        where = f"{file}.candidates[{i}].figures"
        figures = from_plain(Mapping[str, Figure], _field(each, "figures", where), where)
        if key not in figures:
            raise ReportError("a report lacks the figure", where=where, expected=key)
        name = model.label if by_label or not model.recipe else model.variant
        measured[name] = Measured(model, figures[key])
    if len(measured) < len(models):
        raise ReportError("a report has two files of the same name", where=file)
    return PastReport(
        file,
        from_plain(Run, _field(value, "run", str(file)), f"{file}.run"),
        from_plain(Text, _field(value, "text", str(file)), f"{file}.text"),
        from_plain(ModelFile, _field(value, "base", str(file)), f"{file}.base"),
        measured,
    )


def _field(record: Any, name: str, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ReportError("a report lacks a field", where=where, expected=name)
    return record[name]


def _steps(name: str, reports: Sequence[PastReport], key: str) -> tuple[Step, ...]:
    steps: list[Step] = []
    for report in reports:
        if (found := report.measured.get(name)) is None:
            continue
        last = steps[-1] if steps else None
        change = _change(FIGURES[key], report, found, last) if last else ""
        steps.append(Step(report, found, last.found if last else None, change))
    return tuple(steps)


def _change(kind: FigureKind, report: PastReport, found: Measured, last: Step) -> str:
    if other := report.differs(last.report):
        return f"other {other}"
    now, then = found.figure, last.found.figure
    if now.low is None or now.high is None or then.low is None or then.high is None:
        return "no interval"
    between = max(now.low - then.high, then.low - now.high)
    if between <= max(now.floor or 0.0, then.floor or 0.0):
        return "about the same"
    direction = "higher" if now.low > then.high else "lower"
    if kind.worse is None:
        return direction
    return "worse" if direction == kind.worse else "better"


def _settings(report: PastReport) -> dict[str, object]:
    text, run = report.text, report.run
    return {
        "text": (text.sha256, text.ctx, text.chunks, text.tokenizer_sha256),
        "base": sorted(file.sha256 for file in report.base.files),
        "activations": run.options.get("activations"),
        "dtype": run.dtype,
    }


def rows(history: History) -> list[tuple[str, Step, str, str | None]]:
    """Of every file in every report: its name, the step, its value, and the interval, with equal decimals."""
    every = [(name, step) for name, steps in history.steps.items() for step in steps]
    style = wording.column_style(history.kind, [step.found.figure for _, step in every])
    key = history.kind.key
    return [(name, step, *wording.value_and_interval(key, step.found.figure, style)) for name, step in every]


def plain(history: History) -> dict[str, object]:
    """The same as plain values: sizes in bytes, figures as in report.json."""
    steps = [
        {
            "file": name,
            "report": str(step.report.path),
            "started": step.report.run.started,
            "version": step.report.version,
            "file_bytes": step.found.model.file_bytes,
            "value": step.found.figure.value,
            "low": step.found.figure.low,
            "high": step.found.figure.high,
            "change": step.change,
        }
        for name, steps in history.steps.items()
        for step in steps
    ]
    return {"figure": history.kind.key, "steps": steps}


RULE = "Better or worse: the 95 % interval does not overlap that of the report before."
