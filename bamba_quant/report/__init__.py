"""Figures to JSON, Markdown and HTML: what an evaluation found, for programs, for a CI summary and for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bamba_quant.errors import OutputError
from bamba_quant.evaluation.result import Evaluation
from bamba_quant.report.html import to_html
from bamba_quant.report.json_report import read_report, schema_text, to_json
from bamba_quant.report.markdown import to_markdown
from bamba_quant.report.records import ReportError
from bamba_quant.writers.atomic import atomic_files, output_error

__all__ = [
    "ReportError",
    "ReportPaths",
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
def prepared_directory(directory: str | Path) -> Iterator[Path]:
    """``directory``, made before the long work of an evaluation, and gone again where that fails.

    Raises ``OutputError`` when reports cannot be written into it.
    """
    directory = Path(directory)
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        yield _prepare(directory)
    except BaseException:
        with suppress(OSError):  # of one that others have put something into
            for each in made:
                each.rmdir()
        raise


def _prepare(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, directory) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputError("reports cannot be written into this directory", where=directory)
    return directory


def write_reports(evaluation: Evaluation, directory: str | Path) -> ReportPaths:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``directory``, all three or none.

    The directory is made when it is missing; reports that are there are replaced. Raises ``OutputError`` when
    they cannot be written.
    """
    directory = _prepare(Path(directory))
    paths = ReportPaths(directory / "report.json", directory / "report.md", directory / "report.html")
    texts = [write(evaluation).encode("utf-8") for write in (to_json, to_markdown, to_html)]
    targets = [
        (path, len(text))
        for path, text in zip((paths.json, paths.markdown, paths.html), texts, strict=True)
    ]  # fmt: skip
    with atomic_files(targets, overwrite=True) as descriptors:
        for descriptor, text in zip(descriptors, texts, strict=True):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(text)
    return paths
