"""Every example runs on the embedded model, and prints and writes what it says."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bamba_quant.planning.inspection import inspect_path
from bamba_quant.report.json_report import read_report
from bamba_quant_cli.demo import help_text

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example in an empty directory that has ``text.txt``, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(help_text())

    def example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_convert_and_check(run: Run) -> None:
    assert "4,215,880 weights, 5.00 bits per weight" in run("convert_and_check.py")
    assert inspect_path(Path("bamba-mini-Q4_K_M.gguf")).checkpoint.elements == 4_215_880


def test_imatrix_and_quantize(run: Run) -> None:
    assert "22 matrices over 2,048 tokens" in run("imatrix_and_quantize.py", "text.txt")
    for made in ("bamba-mini-Q4_K_M.gguf", "w4a16"):
        assert inspect_path(Path(made)).checkpoint.elements == 4_215_880


def test_allocate_for_a_size(run: Run) -> None:
    assert "of 3,000,000 bytes" in run("allocate_for_a_size.py", "text.txt", "3000000")
    assert 2_950_000 < Path("bamba-mini-EXAMPLE.gguf").stat().st_size <= 3_000_000
    assert "example" in Path("example.toml").read_text("utf-8")


def test_evaluate_files(run: Run) -> None:
    printed = run("evaluate_files.py", "text.txt")
    figures = read_report("report/report.json").candidates[1].figures["kld_mean"]
    assert f"q4_k_m: mean KLD {figures.value:.5f}" in printed


def test_forward_and_generate(run: Run) -> None:
    printed = run("forward_and_generate.py").splitlines()
    assert len(printed) >= 6 and "The function" in printed[5]


def test_every_example_has_a_test() -> None:
    assert {f"test_{file.stem}" for file in EXAMPLES.glob("*.py")} <= globals().keys()
