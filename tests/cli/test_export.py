"""``export`` as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.writers.journal import NAME
from tests.support.command import run
from tests.support.conversion import faulty, to_gguf
from tests.support.models import random_bamba, save_checkpoint


def test_help_has_examples() -> None:
    text = run("export", "--help").stdout
    assert "Examples" in text
    assert "bamba-quant export" in text
    assert "export" in run("--help").stdout


def test_there_and_back(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16")
    done = run("export", file, tmp_path / "out")
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "51 tensors" in done.stderr
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["weights"] == 4_215_880
    again = run("export", file, tmp_path / "out", code=2)
    assert "not empty" in again.stderr
    assert "--overwrite" in again.stderr
    result = json.loads(
        run(
            "export",
            file,
            tmp_path / "out",
            "--overwrite",
            "--dtype",
            "f32",
            "--max-shard-size",
            "5M",
            "--json",
        ).stdout
    )
    assert result["dtype"] == "f32"
    assert result["bytes"] == sum(Path(entry["file"]).stat().st_size for entry in result["files"])
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(
        entry["file"] for entry in result["files"]
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_dry_run_writes_nothing_and_prints_the_plan(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", "q4_k_m")
    arguments = ("export", file, tmp_path / "out", "--dry-run")
    text = run(*arguments, "--tensors").stdout
    assert "q4_k → bf16" in text
    assert "rotary 32/64" in text
    plan = json.loads(run(*arguments, "--json").stdout)
    assert len(plan["plan"]) == plan["tensors"] == 51
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    run(*arguments[:-1])
    written = {str(path): path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {entry["file"]: entry["bytes"] for entry in plan["files"]} == written


def test_refusals(tmp_path: Path) -> None:
    wrong = faulty(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "wrong.gguf")
    assert "bamba-quant repair" in run("export", wrong, tmp_path / "out", code=2).stderr
    assert "nowhere" in run("export", tmp_path / "nowhere.gguf", tmp_path / "out", code=2).stderr
    assert "float8" in run("export", wrong, tmp_path / "out", "--dtype", "float8", code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["4", "0G", "4T", "x"])
def test_bad_sizes(size: str, tmp_path: Path) -> None:
    done = run("export", tmp_path / "m.gguf", tmp_path / "out", "--max-shard-size", size, code=2)
    assert size in done.stderr


def test_a_terminated_export_is_resumed(tmp_path: Path) -> None:
    # Large enough to be caught at work.
    directory = save_checkpoint(random_bamba(vocab_size=700_000), tmp_path / "m", dtype="bfloat16")
    file = to_gguf(directory, tmp_path / "m.gguf", "q8_0", vocab=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    command = ["export", str(file), str(tmp_path / "out"), "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "bamba_quant_cli", *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    journal = tmp_path / "out.partial" / NAME
    while not journal.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGTERM)
    kept = f"finished parts are kept in {tmp_path / 'out.partial'}; continue with --resume"
    assert child.communicate(timeout=60)[1] == f"terminated; {kept}\n"
    assert child.returncode == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "out.partial"]
    run(*command, "--resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "out"]
