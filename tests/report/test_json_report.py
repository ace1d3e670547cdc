"""``report.json`` reads back as it was written, keeps to its schema, and refuses everything else by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from bamba_quant.errors import OutputError
from bamba_quant.evaluation.input_files import REPORTS
from bamba_quant.report.json_report import ReportError, read_report, schema, schema_text, to_json
from bamba_quant.report.write import prepared_directory, write_reports
from tests.report.variants import EDGES, HOSTILE, relabelled

REST = ("low", "high", "lower", "upper", "naive_error", "floor")
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))


@pytest.mark.parametrize("name", EDGES)
def test_round_trip_and_schema(name: str, tmp_path: Path) -> None:
    paths = write_reports(EDGES[name], tmp_path / "new" / "reports")
    assert read_report(paths.json) == EDGES[name]
    VALIDATOR.validate(json.loads(paths.json.read_text("utf-8")))
    assert sorted(path.name for path in paths.json.parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_any_kind_read_back(name: str, tmp_path: Path) -> None:
    evaluation = relabelled(EDGES["tuned"], name)
    file = tmp_path / "report.json"
    file.write_text(to_json(evaluation), "utf-8")
    assert read_report(file) == evaluation


def test_the_packaged_schema_is_that_of_the_records() -> None:
    assert json.loads(schema_text()) == schema(), "write json_report.schema() into report.schema.json again"
    jsonschema.Draft202012Validator.check_schema(schema())


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    evaluation = EDGES["one"]
    broken = replace(evaluation, timing=replace(evaluation.timing, seconds=float("nan")))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_reports(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def changed(tmp_path: Path, change: str, value: object) -> Path:
    """A report in which the entry at the dotted place ``change`` is ``value``, or gone if it is an Ellipsis."""
    content = json.loads(to_json(EDGES["two"]))
    *places, last = [int(part) if part.isdigit() else part for part in change.split(".")]
    inner = content
    for place in places:
        inner = inner[place]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content), "utf-8")
    return file


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("schema", 99, "schema 99"),
        ("schema", True, "schema True"),
        ("schema", ..., "schema None"),
        ("text.ctx", "512", "text.ctx"),
        ("text.ctx", True, "text.ctx"),
        ("text.ctx", 1.5, "text.ctx"),
        ("base.kind", "onnx", "base.kind"),
        ("base.files", {}, "base.files"),
        ("base.extra", 1, "unknown extra"),
        ("candidates.1.flips.lost", ..., "missing lost"),
        ("candidates.1.layers.0.local", "much", "layers[0].local"),
        ("candidates.0.figures.ppl.value", None, "figures.ppl.value"),
    ],
)
def test_other_files_are_refused_by_place(place: str, value: object, complaint: str, tmp_path: Path) -> None:
    file = changed(tmp_path, place, value)
    with pytest.raises(ReportError) as raised:
        read_report(file)
    assert complaint in str(raised.value)
    assert str(file) in str(raised.value)
    assert list(VALIDATOR.iter_errors(json.loads(file.read_text("utf-8"))))


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("candidates.0.figures.ppl.value", 10**400, "1,329 bits"),
        ("timing.seconds", 1e308, "1e\\+306"),
        ("text.tokens", 2**70, "71 bits"),
        ("candidates.0.figures.ppl", ..., "found: ppl"),
        ("candidates.0.figures.strange", {"value": 1.0} | dict.fromkeys(REST), "found: strange"),
        ("candidates.0.gates.0.figure", "strange", "the gates of .*\n.*found: strange"),
        ("noise_floor.figures.strange", 0.1, "the noise floor\n.*found: strange"),
        ("candidates.0.kld_histogram.counts", [1], "kld histogram"),
        ("candidates", [], "has no candidates"),
        ("base.label", "x" * 1_000_000, ""),
    ],
)
def test_values_that_no_report_has(place: str, value: object, complaint: str, tmp_path: Path) -> None:
    file = changed(tmp_path, place, value)
    if not complaint:
        assert to_json(read_report(file))
        return
    with pytest.raises(ReportError, match=complaint) as raised:
        read_report(file)
    assert str(file) in str(raised.value) and len(str(raised.value)) < 4000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"schema": NaN}',
        '{"schema": 1e400}',
        f'{{"schema": {"1" * 5000}}}',
        f'{{"schema": {"[" * 100_000}{"]" * 100_000}}}',
        '{"schema": 2, "schema": 2}',
        f'{{"schema": 2, {", ".join(f"{chr(34)}{i}{chr(34)}: 0" for i in range(10_000))}}}',
        "\ufeff{",
    ],
    ids=lambda content: content[:20],
)
def test_what_is_no_report(content: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(content, "utf-8")
    with pytest.raises(ReportError) as raised:
        read_report(tmp_path / "x")
    assert len(str(raised.value)) < 4000


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "x", tmp_path / "nowhere", tmp_path, tmp_path / "pipe", tmp_path / "large"):
        with pytest.raises(ReportError):
            read_report(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError):
        write_reports(EDGES["one"], tmp_path / "file")
    with pytest.raises(OutputError):
        write_reports(EDGES["one"], tmp_path / "file" / "below")
    with pytest.raises(OutputError), prepared_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_there_stays_unless_it_may_be_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    for call in (write_reports, lambda _, directory: prepared_directory(directory).__enter__()):
        with pytest.raises(OutputError, match=rf"exists already\n.*{name}\n.*--overwrite"):
            call(EDGES["one"], tmp_path)
    assert listing(tmp_path) == {name: b"mine"}
    with prepared_directory(tmp_path, overwrite=True):
        write_reports(EDGES["one"], tmp_path, overwrite=True)
    write_reports(EDGES["two"], tmp_path, overwrite=True)
    assert listing(tmp_path).keys() == set(REPORTS)
    assert read_report(tmp_path / "report.json") == EDGES["two"]


# How an input can be where a report is to go: it is given, and what then stands under the report's name.
INPUTS: dict[str, Callable[[Path, Path], Path]] = {}


def way(function: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    INPUTS[function.__name__] = function
    return function


@way
def by_its_name(report: Path, elsewhere: Path) -> Path:
    report.write_text("mine")
    return report


@way
def by_a_link_to_it(report: Path, elsewhere: Path) -> Path:
    report.write_text("mine")
    (elsewhere / "text.txt").symlink_to(report)
    return elsewhere / "text.txt"


@way
def a_link_from_it(report: Path, elsewhere: Path) -> Path:
    (elsewhere / "text.txt").write_text("mine")
    report.symlink_to(elsewhere / "text.txt")
    return elsewhere / "text.txt"


@way
def another_name_of_the_file(report: Path, elsewhere: Path) -> Path:
    (elsewhere / "text.txt").write_text("mine")
    report.hardlink_to(elsewhere / "text.txt")
    return elsewhere / "text.txt"


@way
def a_file_of_a_model(report: Path, elsewhere: Path) -> Path:
    report.write_text("mine")
    (elsewhere / "config.json").symlink_to(report)
    return elsewhere


@way
def a_template_of_a_model(report: Path, elsewhere: Path) -> Path:
    (elsewhere / "additional_chat_templates").mkdir()
    (elsewhere / "additional_chat_templates" / "tools.jinja").write_text("mine")
    report.hardlink_to(elsewhere / "additional_chat_templates" / "tools.jinja")
    return elsewhere


@way
def another_shard(report: Path, elsewhere: Path) -> Path:
    report.write_text("mine")
    (elsewhere / "m-00002-of-00002.gguf").hardlink_to(report)
    (elsewhere / "m-00001-of-00002.gguf").touch()
    return elsewhere / "m-00001-of-00002.gguf"


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_is_never_replaced(kind: str, name: str, tmp_path: Path) -> None:
    reports, elsewhere = tmp_path / "reports", tmp_path / "elsewhere"
    for directory in (reports, elsewhere):
        directory.mkdir()
    given = INPUTS[kind](reports / name, elsewhere)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="would replace"):
            write_reports(EDGES["one"], reports, overwrite=overwrite, inputs=[given])
        with pytest.raises(OutputError, match="would replace"), prepared_directory(
            reports, overwrite=overwrite, inputs=[given]
        ):  # fmt: skip
            pass
    assert listing(reports) == {name: b"mine"}


def test_reports_beside_a_model_are_not_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    write_reports(EDGES["one"], tmp_path, inputs=[tmp_path])
    write_reports(EDGES["two"], tmp_path, overwrite=True, inputs=[tmp_path])
    assert read_report(tmp_path / "report.json") == EDGES["two"]


def test_two_outputs_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="two outputs"), prepared_directory(
        tmp_path / "new", inputs=[tmp_path / "new" / "report.json"]
    ):  # fmt: skip
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_directory_for_reports_that_do_not_come(failure: type[BaseException], tmp_path: Path) -> None:
    deep = tmp_path / "deep" / "down"
    with prepared_directory(deep) as made:
        assert made == deep and deep.is_dir()
    with pytest.raises(failure), prepared_directory(deep):
        raise failure
    assert deep.is_dir()  # it was there before
    with pytest.raises(failure), prepared_directory(deep / "more"):
        (deep / "more" / "theirs").touch()
        raise failure
    assert (deep / "more" / "theirs").is_file()
    with pytest.raises(failure), prepared_directory(tmp_path / "new" / "down"):
        raise failure
    assert not (tmp_path / "new").exists()
