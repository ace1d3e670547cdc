"""Figures to JSON, Markdown and HTML: what an evaluation found, for programs, for a CI summary and for people."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bamba_quant.errors import OutputError
from bamba_quant.evaluation.input_files import REPORTS, input_files
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.report.html import to_html
from bamba_quant.report.json_report import ReportError, read_report, schema_text, to_json
from bamba_quant.report.markdown import to_markdown
from bamba_quant.writers.atomic import atomic_files, check_target, output_error
from bamba_quant.writers.commit import restore

__all__ = [
    "ReportError",
    "ReportPaths",
    "check_output",
    "prepared_directory",
    "read_report",
    "schema_text",
    "to_html",
    "to_json",
    "to_markdown",
    "write_reports",
]


class ReportPaths(NamedTuple):
    json: Path
    markdown: Path
    html: Path


@contextmanager
def prepared_directory(
    directory: str | Path, *, overwrite: bool = False, inputs: Collection[Path] = ()
) -> Iterator[Path]:
    """``directory``, made before the long work of an evaluation, and gone again where that fails.

    Raises ``OutputError`` when ``write_reports`` could not write into it.
    """
    directory = Path(directory)
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        yield _prepare(directory, overwrite, inputs)
    except BaseException:
        with suppress(OSError):  # of one that others have put something into
            for each in made:
                each.rmdir()
        raise


def write_reports(
    evaluation: Evaluation, directory: str | Path, *, overwrite: bool = False, inputs: Collection[Path] = ()
) -> ReportPaths:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``directory``, all three or none.

    The directory is made when it is missing. Raises ``OutputError`` when they cannot be written, when one of them
    exists and ``overwrite`` is not given, and when one is, under any name, among ``inputs``: files, and
    directories with the files in them.
    """
    directory = _prepare(Path(directory), overwrite, inputs)
    paths = _paths(directory)
    texts = [write(evaluation).encode("utf-8") for write in (to_json, to_markdown, to_html)]
    targets = [(path, len(text)) for path, text in zip(paths, texts, strict=True)]
    with atomic_files(targets, overwrite=overwrite, inputs=input_files(inputs)) as descriptors:
        for descriptor, text in zip(descriptors, texts, strict=True):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(text)
    return paths


def _paths(directory: Path) -> ReportPaths:
    return ReportPaths(*(directory / name for name in REPORTS))


def _prepare(directory: Path, overwrite: bool, inputs: Collection[Path]) -> Path:
    restore(*_paths(directory))  # what a killed run left decides which of them exist
    for path in _paths(directory):
        check_output(path, overwrite=overwrite, inputs=inputs)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, directory) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputError("reports cannot be written into this directory", where=directory)
    return directory


def check_output(file: Path, *, overwrite: bool, inputs: Collection[Path]) -> None:
    """Raise ``OutputError`` when ``file`` exists without ``overwrite``, or is one of ``inputs``, read or written."""
    if not file.exists() and os.path.realpath(file) in map(os.path.realpath, inputs):
        raise OutputError("two outputs of this run have the same name", where=file, fix="give another name")
    check_target(file, overwrite, input_files(inputs))
