"""The notebooks among the examples: valid, without output, and their cells run in order."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.report.html import NotebookEvaluation
from bamba_quant_cli.demo import help_text

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(embedded_model(), tmp_path / "Bamba-9B", ignore=shutil.ignore_patterns("README.md"))
    words = help_text()
    (tmp_path / "some.txt").write_text(words[:12_000])
    (tmp_path / "calib.txt").write_text(words[12_000:30_000])
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = [_run(cell.source, f"{file.name}, cell {number}", names) for number, cell in enumerate(cells)]
    (evaluation,) = (each for each in shown if isinstance(each, NotebookEvaluation))
    assert "<table" in evaluation._repr_html_().replace("&lt;", "<") and "svg" in evaluation._repr_html_()
    table = evaluation.to_pandas()
    assert list(table.index) == [each.model.label for each in evaluation.candidates]
    for candidate in evaluation.candidates:
        row = table.loc[candidate.model.label]
        assert row["bytes"] == candidate.model.file_bytes and row["passed"] == candidate.passed
        for key, figure in candidate.figures.items():
            assert row[key] == figure.value and (figure.low is None or row[f"{key}_low"] == figure.low)


def _run(source: str, place: str, names: dict[str, Any]) -> Any:
    """Run a cell; what a notebook would show below it."""
    tree = ast.parse(source, place)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    return eval(compile(ast.Expression(last.value), place, "eval"), names) if last else None
