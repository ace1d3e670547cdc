"""``imatrix`` and ``--calibrate`` as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant_cli.app import app
from tests.support.conversion import assert_same_tensors
from tests.support.directories import tensors

TEXT = "The miller looked at the river, and the river went on turning his wheel. " * 120


def run(*arguments: object, code: int = 0) -> Result:
    """In this process, where torch and the kernels are loaded already; errors are what ``main`` would print."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(done.exception, BambaQuantError), done.output
    return str(done.exception)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_calibrating_while_converting_is_both_steps(text: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    shown = run("imatrix", embedded_model(), "--text", text, "--outfile", imatrix, "--chunks", 3)
    assert shown.stdout.strip() == str(imatrix)
    assert "3 chunks of 512" in shown.stderr
    options = ("--outtype", "q4_k_m", "--outfile")
    run("convert", embedded_model(), "--imatrix", imatrix, *options, tmp_path / "two.gguf")
    run(
        "convert",
        embedded_model(),
        "--calibrate",
        text,
        "--calibrate-chunks",
        3,
        *options,
        tmp_path / "one.gguf",
    )
    assert_same_tensors(tmp_path / "one.gguf", tmp_path / "two.gguf")
    values = open_checkpoint(tmp_path / "one.gguf").metadata
    assert values["quantize.imatrix.dataset"].value == str(text)[:127]
    assert values["quantize.imatrix.chunks_count"].value == 3
    run("int4", embedded_model(), tmp_path / "two", "--imatrix", imatrix)
    run("int4", embedded_model(), tmp_path / "one", "--calibrate", text, "--calibrate-chunks", 3)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_json_and_merging(text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.dat", tmp_path / "b.gguf"
    words = ("imatrix", embedded_model(), "--text", text, "--ctx", 128, "--json")
    found = json.loads(run(*words, "-o", first, "--chunks", 2, "--output-tensor").stdout)
    assert (found["tokens"], found["chunks"], found["entries"]) == (256, 2, 23)
    assert found["experts_without_data"] == {}
    assert "output.weight" in read_imatrix(first).entries
    merged = json.loads(run(*words, "-o", second, "--chunks", 1, "--merge", first).stdout)
    assert (merged["tokens"], merged["chunks"], merged["entries"]) == (128, 3, 23)
    assert "exists already" in refused(*words, "-o", second)


def test_bad_usage_is_named(text: Path, tmp_path: Path) -> None:
    assert "nothing to measure" in refused("imatrix", embedded_model(), "-o", tmp_path / "x")
    short = tmp_path / "short.txt"
    short.write_text("Short.")
    assert "too short" in refused("imatrix", embedded_model(), "--text", short, "-o", tmp_path / "x")
    both = ("--calibrate", text, "--imatrix", text)
    assert "exclude each other" in refused("convert", embedded_model(), *both)
    alone = refused("int4", embedded_model(), tmp_path / "out", "--calibrate-chunks", 3)
    assert "--calibrate-chunks has no effect without --calibrate" in alone
    assert not (tmp_path / "x").exists()


def test_a_dry_run_measures_nothing(text: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((embedded_model() / "config.json").read_bytes())
    shown = run("convert", config, "--calibrate", text, "--outtype", "q2_k_s", "--dry-run", code=0).stdout
    assert "Q2_K_S.gguf" in shown
