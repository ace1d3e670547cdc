"""``report.json`` reads back as it was written, keeps to its schema, and refuses everything else by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from bamba_quant.errors import BambaQuantError, OutputError
from bamba_quant.report import (
    ReportError,
    prepared_directory,
    read_report,
    schema_text,
    to_json,
    write_reports,
)
from bamba_quant.report.json_report import schema
from tests.report.variants import EDGES, HOSTILE, relabelled

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
    evaluation = relabelled(EDGES["two"], name)
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


def test_what_is_no_report(tmp_path: Path) -> None:
    for content in ("", "[]", "3", "{}", '{"schema": NaN}', "\ufeff{"):
        (tmp_path / "x").write_text(content, "utf-8")
        with pytest.raises(ReportError):
            read_report(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "x", tmp_path / "nowhere", tmp_path):
        with pytest.raises(BambaQuantError):
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
    write_reports(EDGES["one"], tmp_path)
    write_reports(EDGES["two"], tmp_path)
    assert read_report(tmp_path / "report.json") == EDGES["two"]


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
