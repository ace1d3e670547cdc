"""``bamba-quant fp8`` as users run it: help, dry runs, files, an interrupt, and errors that name what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.writers import tasks
from bamba_quant.writers.resumable import partial_of
from bamba_quant_cli.app import app
from bamba_quant_cli.app import run as command_line
from tests.cli.test_interrupts import ran, tell
from tests.planning.test_quantize import BAMBA_9B
from tests.support import directories
from tests.support.command import run

RUNNER = CliRunner()


def test_help_has_examples() -> None:
    shown = RUNNER.invoke(app, ["fp8", "--help"])
    assert shown.exit_code == 0
    for word in ("--scheme", "--ignore", "--resume", "--dry-run", "--scales", "bamba-quant fp8 ./Bamba-9B"):
        assert word in shown.stdout


def test_a_model_is_quantized(tmp_path: Path) -> None:
    done = run(
        "fp8", embedded_model(), tmp_path / "out", "--ignore", "hybrid", "--max-shard-size", "2M", "--json"
    )
    said = json.loads(done.stdout)
    files = {Path(entry["file"]).name: entry["bytes"] for entry in said["files"]}
    assert files == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert said["scheme"] == "fp8-dynamic"
    assert said["method"] == "search"
    assert (
        sum(str(t.dtype) == "torch.float8_e4m3fn" for t in directories.tensors(tmp_path / "out").values())
        == (said["matrices"])
    )


def test_its_activations_are_rounded_when_asked(tmp_path: Path) -> None:
    run("fp8", embedded_model(), tmp_path / "out")
    text = tmp_path / "text"
    text.write_text("The miller ground the corn, and the river turned the wheel. " * 20)
    found = {}
    for kind in ("none", "checkpoint"):
        options = ("--activations", kind, "--text", text, "--ctx", 64, "--chunks", 2, "--json")
        found[kind] = json.loads(run("perplexity", tmp_path / "out", *options).stdout)
        assert found[kind]["activations"] == kind
    assert found["none"]["backend"] == "numba"
    assert found["checkpoint"]["backend"] == "numba, activations e4m3 by token (emulated)"
    assert 0 < abs(found["checkpoint"]["perplexity"] / found["none"]["perplexity"] - 1) < 0.05
    # "file" is the old name of "checkpoint".
    done = run(
        "generate", tmp_path / "out", "--prompt", "The", "--max-tokens", 3, "--activations", "file", "--json"
    )
    assert json.loads(done.stdout)["backend"] == found["checkpoint"]["backend"]
    for words, complaint in (
        (("--activations", "checkpoint", "--backend", "numpy"), "activations none"),
        (("--activations", "fp4"), "'fp4' is not one of"),
    ):
        done = run("perplexity", tmp_path / "out", "--text", text, "--ctx", 64, *words, code=2)
        assert complaint in done.stderr


def test_a_dry_run_of_a_configuration(tmp_path: Path) -> None:
    shutil.copy(BAMBA_9B, tmp_path / "config.json")
    shown = RUNNER.invoke(app, ["fp8", str(tmp_path), str(tmp_path / "o"), "--scheme", "tensor", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for figure in ("39.12 GB", "10.83 GB", "2.10 GB", "8.73 GB"):
        assert figure in shown.stdout
    file = RUNNER.invoke(
        app, ["fp8", str(tmp_path / "config.json"), "o", "--dry-run", "--json", "--scheme", "tensor"]
    )
    planned = json.loads(file.stdout)
    assert planned["bytes_by_dtype"]["F8_E4M3"] == 8_727_822_336
    assert len(planned["plan"]) == len({row["source"] for row in planned["plan"]})
    assert not (tmp_path / "o").exists()
    (tmp_path / "config.json").rename(tmp_path / "bamba.json")
    refused = run("fp8", tmp_path / "bamba.json", "o", "--dry-run", code=2)
    assert "a file called config.json" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "fp8", "--ignore", "attn_q"], "fuses would be ignored"),
        (["--scales", "best"], "absmax"),
        (["--dtype", "f64"], "bf16"),
        (["--ignore", "nothing*"], "hybrid"),
        (["--keep", "nothing*"], "--ignore nothing*"),  # the old name
        (["--format", "fp8", "--scheme", "tensor"], "--format fp8 --scheme block"),
        (["--format", "gptq"], "'gptq' is not one of 'compressed-tensors', 'fp8'"),
    ],
)
def test_wrong_options(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run("fp8", embedded_model(), tmp_path / "out", *arguments, code=2)
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_the_input_as_the_output(tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(embedded_model(), model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    done = run("fp8", model, model, "--overwrite", code=2)
    assert "would replace the input" in done.stderr
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run("fp8", embedded_model(), tmp_path, code=2)
    assert "not empty" in done.stderr


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    kept = f"finished parts are kept in {partial_of(target)}; continue with --resume\n"
    with monkeypatch.context() as patched:
        patched.setattr(
            "sys.argv", ["bamba-quant", "fp8", str(embedded_model()), str(target), "--threads", "1"]
        )
        for number, word in ((signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")):
            patched.setattr(tasks, "wait", lambda *_, number=number, **__: tell(number))
            assert ran(command_line) == (128 + number, f"{word}; {kept}")
            assert partial_of(target).is_dir()
            patched.setattr("sys.argv", [*sys.argv, "--resume"])
    assert "--resume" in run("fp8", embedded_model(), target, code=2).stderr
    run("fp8", embedded_model(), target, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
