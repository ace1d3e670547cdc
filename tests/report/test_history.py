"""A history orders reports, matches their files, and calls worse only what the intervals show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bamba_quant.evaluation.result import Evaluation, Figure
from bamba_quant.printable import printable
from bamba_quant.report.charts.history import history_chart
from bamba_quant.report.history import Step, read_history, worse
from bamba_quant.report.history_page import history_page
from bamba_quant.report.json_report import ReportError, to_json
from bamba_quant.report.page import as_svg
from tests.report.test_html import FETCHING, Parsed
from tests.report.variants import EDGES, HOSTILE, relabelled
from tests.support.command import run
from tests.support.evaluations import make_evaluation

TWO = EDGES["two"]


def scaled(figure: Figure, factor: float) -> Figure:
    ends = (None if each is None else each * factor for each in (figure.low, figure.high))
    return replace(figure, value=figure.value * factor, low=next(ends), high=next(ends))


def later(evaluation: Evaluation, month: int, factor: float = 1.0) -> Evaluation:
    """The same evaluation, so many months later, with ``factor`` times the mean KLD of its first file."""
    first, *others = evaluation.candidates
    figures = {**first.figures, "kld_mean": scaled(first.figures["kld_mean"], factor)}
    run_then = replace(
        evaluation.run,
        started=f"2026-{month:02}-01T00:00:00+00:00",
        versions={**evaluation.run.versions, "bamba-quant": f"0.{month}.0"},
    )
    return replace(evaluation, run=run_then, candidates=(replace(first, figures=figures), *others))


def saved(evaluation: Evaluation, directory: Path) -> Path:
    directory.mkdir()
    (directory / "report.json").write_text(to_json(evaluation), "utf-8")
    return directory


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    value = json.loads(file.read_text("utf-8"))
    change(value)
    file.write_text(json.dumps(value), "utf-8")
    return file


def changes(steps: tuple[Step, ...]) -> list[str]:
    return [step.change for step in steps]


def test_order_matching_and_changes(tmp_path: Path) -> None:
    """Given in another order; the third is twice as far, the fourth as near again, the fifth on another text."""
    other = replace(TWO, text=replace(TWO.text, sha256="0" * 64))
    paths = [
        saved(evaluation, tmp_path / str(i))
        for i, evaluation in enumerate(
            (later(TWO, 3, 2), later(TWO, 1), later(TWO, 2, 1.01), later(other, 5), later(TWO, 4))
        )
    ]
    found = read_history(paths)
    assert [report.version for report in found.reports] == [f"0.{month}.0" for month in range(1, 6)]
    q8_0, q4_k_m = (found.steps[c.model.variant] for c in TWO.candidates)
    assert changes(q8_0) == ["", "about the same", "worse", "better", "other text"]
    assert changes(q4_k_m) == ["", *["about the same"] * 3, "other text"]
    assert [step.found.figure for step in q4_k_m] == [TWO.candidates[1].figures["kld_mean"]] * 5
    assert worse(read_history(paths[1:3])) == []
    ((name, step),) = worse(read_history(paths[:3]))
    assert (name, step.report.version) == ("q8_0", "0.3.0")
    with pytest.raises(ReportError, match="other text"):
        worse(found)
    assert changes(read_history(paths[:3], "same_top").steps["q8_0"]) == ["", *["about the same"] * 2]


def test_files_that_share_a_variant_are_matched_by_their_labels(tmp_path: Path) -> None:
    alike = replace(
        TWO, candidates=tuple(replace(c, model=replace(c.model, recipe="q4_0")) for c in TWO.candidates)
    )
    found = read_history([saved(later(alike, 1), tmp_path / "a"), saved(later(TWO, 2), tmp_path / "b")])
    assert {name: len(steps) for name, steps in found.steps.items()} == {
        c.model.label: 2 for c in TWO.candidates
    }


def test_schema_3_reads_as_4_does(tmp_path: Path) -> None:
    new = saved(TWO, tmp_path / "new")
    old = saved(TWO, tmp_path / "old") / "report.json"

    def older(value: dict[str, Any]) -> None:
        value["schema"] = 3
        for candidate in value["candidates"]:
            for tensor in candidate["tensors"]:
                del tensor["stored_name"]

    changed(old, older)
    mine, theirs = read_history([new]), read_history([old])
    assert {n: [s.found for s in steps] for n, steps in mine.steps.items()} == {
        n: [s.found for s in steps] for n, steps in theirs.steps.items()
    }


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda value: value.update(schema=2), "schema 2"),
        (lambda value: value.update(schema=True), "schema True"),
        (lambda value: value.pop("text"), "text"),
        (lambda value: value.update(candidates=[]), "has no candidates"),
        (lambda value: value["candidates"][0].pop("figures"), "figures"),
        (lambda value: value["candidates"][0]["figures"].pop("kld_mean"), "kld_mean"),
        (lambda value: value["candidates"][1].update(model=value["candidates"][0]["model"]), "same name"),
        (lambda value: value["run"].update(started=5), "started"),
    ],
)
def test_foreign_reports_are_named(
    change: Callable[[dict[str, Any]], object], found: str, tmp_path: Path
) -> None:
    file = changed(saved(TWO, tmp_path / "report") / "report.json", change)
    with pytest.raises(ReportError, match=found) as caught:
        read_history([saved(TWO, tmp_path / "good"), file])
    assert str(file.resolve()) in str(caught.value)


def test_what_cannot_be_compared_is_an_error_and_no_pass(tmp_path: Path) -> None:
    one = saved(later(TWO, 1), tmp_path / "one")
    alone = saved(later(make_evaluation(("q2_k",)), 2), tmp_path / "alone")
    few = replace(EDGES["no intervals"], base=TWO.base, text=TWO.text)
    for paths, reason in (
        ([one], "no file"),
        ([one, alone], "no file"),
        ([saved(later(few, i), tmp_path / f"few{i}") for i in (3, 4)], "no interval"),
    ):
        with pytest.raises(ReportError, match=reason):
            worse(read_history(paths))
    two = saved(later(TWO, 2), tmp_path / "two")
    with pytest.raises(ReportError, match="neither better nor worse"):
        worse(read_history([one, two], "delta_p_max"))


@pytest.mark.parametrize("name", [*HOSTILE, "plain"])
def test_page_and_picture_hold_everything_and_ask_for_nothing(name: str, tmp_path: Path) -> None:
    evaluation = TWO if name == "plain" else relabelled(TWO, name)
    found = read_history([saved(later(evaluation, i), tmp_path / str(i)) for i in (1, 2)])
    page = history_page(found)
    parsed = Parsed(page)
    assert page.count("<script") == 1
    assert ("meta", "default-src 'none'") in [
        (tag, (attributes.get("content") or "").split(";")[0]) for tag, attributes in parsed.elements
    ]
    assert not any(FETCHING & attributes.keys() or "href" in attributes for _, attributes in parsed.elements)
    for steps, label in zip(found.steps.values(), found.steps, strict=True):
        assert sum(row[0].startswith(f"{printable(label)}2026-") for row in parsed.rows) == len(steps)
    for width in (328.0, 1132.0):
        picture = ElementTree.fromstring(as_svg(history_chart(found, width)))
        points = [each for each in picture.iter() if "mark" in (each.get("class") or "").split()]
        assert len(points) == sum(map(len, found.steps.values()))


def test_the_command(tmp_path: Path) -> None:
    a, b, c = (saved(later(TWO, i, f), tmp_path / str(i)) for i, f in ((1, 1.0), (2, 1.01), (3, 2.0)))
    page, picture = tmp_path / "history.html", tmp_path / "history.svg"
    done = run("history", a, b / "report.json", "--fail-if-worse", "-o", page)
    assert "about the same" in done.stdout and page.read_text("utf-8").startswith("<!doctype html>")
    assert "exists" in run("history", a, b, "-o", page, code=2).stderr
    failed = run("history", c, a, b, "--fail-if-worse", "--json", "-o", picture, code=1)
    assert "WORSE q8_0" in failed.stderr and "q4_k_m" not in failed.stderr
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    values = [row["value"] for row in json.loads(failed.stdout)["steps"] if row["file"] == "q8_0"]
    assert values == [factor * TWO.candidates[0].figures["kld_mean"].value for factor in (1.0, 1.01, 2.0)]
    for arguments, reason in (
        ((tmp_path,), "cannot be read"),
        ((a, "--figure", "kld_mean_"), "kld_mean,"),
        ((a, "-o", tmp_path / "x.png"), ".svg or an .html"),
    ):
        assert reason in run("history", *arguments, code=2).stderr
    assert not (tmp_path / "x.png").exists()
