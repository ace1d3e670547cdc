"""The command as users run it: output, exit codes, errors without tracebacks, help that is quick and has examples."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import OutputError
from bamba_quant.report.json_report import read_report
from bamba_quant_cli.app import app
from tests.support.command import run
from tests.support.conversion import faulty
from tests.support.models import random_bamba, save_checkpoint

COMMANDS = (
    "convert",
    "recipes",
    "allocate",
    "inspect",
    "repair",
    "export",
    "imatrix",
    "generate",
    "perplexity",
    "evaluate",
    "lm-eval",
    "compare",
    "history",
    "demo",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Examples" in text
    assert f"bamba-quant {command}" in text


def test_overview_names_every_command() -> None:
    assert all(command in run("--help").stdout for command in COMMANDS)
    assert run("--version").stdout.startswith("bamba-quant ")


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = ("torch", "numpy", "transformers", "gguf", "bamba_quant.planning.convert")
    code = f"import sys, bamba_quant_cli.app; print([name for name in sys.modules if name in {heavy}])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_convert_prints_the_file(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    done = run("convert", embedded_model(), "--outfile", target, "--outtype", "q8_0")
    assert done.stdout.strip() == str(target)
    assert "51 tensors" in done.stderr
    again = run("convert", embedded_model(), "--outfile", target, code=2)
    assert "exists already" in again.stderr
    assert "--overwrite" in again.stderr
    run("convert", embedded_model(), "--outfile", target, "--overwrite", "--threads", 1)


def test_convert_as_json(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    result = json.loads(run("convert", embedded_model(), "--outfile", target, "--json").stdout)
    assert result["files"] == [{"file": str(target), "bytes": target.stat().st_size}]
    assert result["bytes"] == target.stat().st_size
    assert result["weights"] == 4_215_880


def test_dry_run_writes_nothing_and_prints_the_plan(tmp_path: Path) -> None:
    arguments = ("convert", embedded_model(), "--outfile", tmp_path / "x.gguf", "--dry-run")
    text = run(*arguments, "--tensors").stdout
    assert "model.layers.2.self_attn.q_proj.weight" in text
    assert "rotary 32/64" in text
    plan = json.loads(run(*arguments, "--json").stdout)
    assert len(plan["plan"]) == plan["tensors"] == 51
    assert {"source", "name", "role", "transform", "type", "shape", "bytes"} <= plan["plan"][0].keys()
    assert list(tmp_path.iterdir()) == []
    run(*arguments[:-1])
    assert plan["files"] == [
        {"file": str(tmp_path / "x.gguf"), "bytes": (tmp_path / "x.gguf").stat().st_size}
    ]


def test_split_and_inspect(tmp_path: Path) -> None:
    done = run("convert", embedded_model(), "--outfile", tmp_path / "x.gguf", "--split-max-size", "3M")
    files = done.stdout.split()
    assert [Path(file).name for file in files] == [
        f"x-0000{i + 1}-of-0000{len(files)}.gguf" for i in range(len(files))
    ]
    assert len(files) > 2
    text = run("inspect", files[0], "--tensors").stdout
    assert "mmAm" in text
    assert "blk.3.ssm_a" in text
    assert json.loads(run("inspect", files[-1], "--json").stdout)["weights"] == 4_215_880


def test_vocabulary_only_and_none(tmp_path: Path) -> None:
    run("convert", embedded_model(), "--outfile", tmp_path / "v.gguf", "--vocab-only")
    vocabulary = open_checkpoint(tmp_path / "v.gguf")
    assert not vocabulary.tensors
    assert len(vocabulary.metadata["tokenizer.ggml.tokens"].value) == 2048
    run("convert", embedded_model(), "--outfile", tmp_path / "n.gguf", "--no-vocab")
    assert open_checkpoint(tmp_path / "n.gguf").metadata["tokenizer.ggml.model"].value == "none"
    run("convert", embedded_model(), "--outfile", tmp_path / "x.gguf", "--no-vocab", "--vocab-only", code=2)


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    done = run("convert", directory, "--outfile", tmp_path / "x.gguf", code=2)
    assert "no tokenizer" in done.stderr
    assert "--no-vocab" in done.stderr


@pytest.mark.parametrize("size", ["4", "0G", "4T", "x"])
def test_bad_sizes(size: str, tmp_path: Path) -> None:
    done = run(
        "convert", embedded_model(), "--outfile", tmp_path / "x.gguf", "--split-max-size", size, code=2
    )
    assert size in done.stderr


def test_errors_name_file_and_tensor(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    state["model.layers.2.feed_forward.up_proj.weight"][3, 4] = torch.nan
    save_file(state, directory / "model.safetensors")
    done = run("convert", directory, "--no-vocab", "--outfile", tmp_path / "x.gguf", code=2)
    assert "model.safetensors, tensor model.layers.2.feed_forward.up_proj.weight" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    done = run("convert", tmp_path / "nowhere", code=2)
    assert "nowhere" in done.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes long enough to be caught at work."""
    model = random_bamba(vocab_size=600_000, hidden_size=64)
    return save_checkpoint(model, tmp_path_factory.mktemp("large") / "m", dtype="bfloat16")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, large: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "bamba_quant_cli", "convert", str(large), "--no-vocab", "--outtype", "f32",
         "--outfile", str(tmp_path / "x.gguf"), "--threads", "1"], stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + number
    assert said == f"{'interrupted' if number == signal.SIGINT else 'terminated'}; nothing written\n"
    assert not list(tmp_path.iterdir())


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    for name, complaint in (
        ("x{foo}.gguf", "{ftype}"),
        ("x{.gguf", "{ftype}"),
        ("x-00001-of-00003.gguf", "--split-max-size"),
        ("nowhere/", "does not exist"),
        ("x" * 300, "too long"),
    ):
        done = run("convert", embedded_model(), "--outfile", f"{tmp_path}/{name}", code=2)
        assert complaint in done.stderr
    assert not list(tmp_path.iterdir())


def test_repair(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    wrong = faulty(directory, tmp_path / "wrong.gguf")
    done = run("repair", wrong)
    assert done.stdout.strip() == str(tmp_path / "wrong-repaired.gguf")
    assert "2 of" in done.stderr
    run("repair", wrong, "--in-place")
    assert wrong.read_bytes() == (tmp_path / "wrong-repaired.gguf").read_bytes()
    assert "right order" in run("repair", wrong, code=2).stderr
    split = faulty(directory, tmp_path / "split.gguf", split_max_bytes=60_000)
    run("repair", split, "--in-place")
    assert "bamba_quant.repaired" in open_checkpoint(split).metadata
    assert not list(tmp_path.glob("*repaired-*"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a demo on a shorter text than usual, and what it printed."""
    directory = tmp_path_factory.mktemp("x") / "demo"
    with patch("bamba_quant_cli.demo._CHUNKS", 8):
        return directory, run("demo", "--out", directory).stdout


def test_demo(demo: tuple[Path, str]) -> None:
    directory, text = demo
    report = read_report(directory / "report" / "report.json")
    assert [candidate.model.recipe for candidate in report.candidates] == [
        *("bf16", "q8_0", "q4_k_m", "fp8-dynamic", "int4")
    ]
    for candidate in report.candidates:
        assert candidate.model.recipe in text
        assert Path(candidate.model.path).exists()
        assert candidate.layers
    page = directory / "report" / "report.html"
    assert str(page) in text
    assert page.is_file()
    again = run(*shlex.split(report.run.command)[1:]).stdout
    assert f"{report.text.chunks} chunks of {report.text.ctx}" in again


def test_a_demo_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bamba_quant_cli.demo.KINDS", ("q8_0",))
    monkeypatch.setattr("bamba_quant_cli.demo.find_spec", lambda name: None)
    done = run("demo", "--out", tmp_path / "demo")
    assert "pip install 'bamba-quant[torch]'" in done.stderr
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"bamba-mini-Q8_0.gguf", "demo.sha256"}


def test_a_demo_replaces_what_demos_made(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(demo[0], tmp_path / "demo")
    listed = subprocess.run(
        ["sha256sum", "-c", "demo.sha256"], cwd=directory, check=True, capture_output=True
    )
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert {line.split(":")[0] for line in listed.stdout.decode().splitlines()} == files - {"demo.sha256"}
    (directory / "mine.txt").write_text("mine")
    (directory / "report" / "mine.txt").write_text("mine")
    lines = (directory / "demo.sha256").read_text().splitlines()
    # As an interrupt leaves it.
    (directory / "demo.sha256").write_text("\n".join(lines[:-4]) + "\n")
    shutil.rmtree(directory / "report")
    (directory / "python-help.txt").unlink()
    monkeypatch.setattr("bamba_quant_cli.demo.KINDS", ("q8_0",))
    monkeypatch.setattr("bamba_quant_cli.demo._CHUNKS", 8)
    done = CliRunner().invoke(app, ["demo", "--out", str(directory)])
    assert done.exit_code == 0, done.exception
    assert len((directory / "demo.sha256").read_text().splitlines()) == len(lines)
    assert (directory / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("a file", "python-help.txt"),
        ("a file", "bamba-mini-Q8_0.gguf"),
        ("a file", "bamba-mini-fp8-dynamic/config.json"),
        ("a link", "report/report.md"),
        ("a link", "demo.sha256"),
    ],
)
def test_a_demo_keeps_what_no_demo_made(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    file = tmp_path / "demo" / name
    file.parent.mkdir(parents=True)
    if kind == "a link":
        file.symlink_to(tmp_path / "mine")
    else:
        file.write_text("mine")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert isinstance(done.exception, OutputError)
    assert f"no demo made, or that was changed since\n  where: {file}" in str(done.exception)
    assert [path for path in (tmp_path / "demo").rglob("*") if not path.is_dir()] == [file]
    assert file.read_text() == "mine"
