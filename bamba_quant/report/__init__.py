"""Figures to JSON, Markdown and HTML: what an evaluation found, for programs, for a CI summary and for people."""

from __future__ import annotations

import os
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
    "prepare_directory",
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


def prepare_directory(directory: str | Path) -> Path:
    """Make ``directory`` and see that reports can be written into it, before the long work of an evaluation.

    Raises ``OutputError`` when they cannot.
    """
    directory = Path(directory)
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
    directory = prepare_directory(directory)
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
