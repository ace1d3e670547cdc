"""Several processes under torchrun: one process's figures and files to the last bit, and one error when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant.report.json_report import read_report
from tests.support.conversion import to_gguf

# Of the 64 that are worked on at once: four groups, the last of them not whole.
SMALL = ("--ctx", 64, "--resamples", 1000, "--floor-chunks", 2, "--drift-chunks", 1, "--chunks", 200)
# Sums of another number of threads differ in their last bits.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Runs the command line with a fault in the second process, at a tensor of the third layer.
FAULTY = """
import os, signal, sys
from bamba_quant.errors import CheckpointError
from bamba_quant.inference.weights import LazyWeights
from bamba_quant_cli.app import main
fault, rows = sys.argv.pop(1), LazyWeights.rows
def faulty(self, name, *arguments, **more):
    if os.environ["RANK"] == "1" and ".layers.2." in name:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise CheckpointError("a tensor cannot be read", where=name) if fault == "error" else KeyError(name)
    return rows(self, name, *arguments, **more)
LazyWeights.rows = faulty
main()
"""


def torchrun(processes: int, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        *words,
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT
    )
    assert done.returncode == code, done.stderr
    return done


def alone(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "bamba_quant_cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=ENVIRONMENT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_gguf(embedded_model(), tmp_path_factory.mktemp("files") / "mini-q4.gguf", "q4_k_m")


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what tells of the run: its command, its time, the files it wrote."""
    run = report["run"]
    told = {"command": "", "started": "", "device": "", "options": run["options"] | {"save_base": ""}}
    return report | {"timing": {}, "run": run | told}


def test_figures_reports_and_saved_bases_are_those_of_one_process(
    text: Path, q4: Path, tmp_path: Path
) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--max-kld", 0.9)
    bases = [tmp_path / f"{processes}.kld" for processes in (1, 2, 3)]
    expected = alone(*words, "--save-base", bases[0], "--json")
    for processes in (2, 3):
        directory, base = tmp_path / f"report-{processes}", bases[processes - 1]
        more = ("--save-base", base, "--report-dir", directory, "--json")
        done = torchrun(processes, "-m", "bamba_quant_cli", *words, *more)
        found = json.loads(done.stdout)
        assert comparable(found) == comparable(expected)
        assert found["run"]["command"].startswith(
            f"torchrun --nproc-per-node {processes} -m bamba_quant_cli "
        )
        assert found["run"]["device"] == f"cpu in {processes} processes"
        assert base.read_bytes() == bases[0].read_bytes()
        assert read_report(directory / "report.json").candidates[0].passed
        assert done.stderr.count(str(directory / "report.html")) == 1
    words = ("evaluate", bases[0], q4, *SMALL, "--json")
    found = json.loads(torchrun(2, "-m", "bamba_quant_cli", *words).stdout)
    assert comparable(found) == comparable(alone(*words))


@pytest.mark.parametrize("how", [(), ("--stream",), ("--backend", "numpy", "--chunks", "5")])
def test_perplexity_is_that_of_one_process(how: tuple[str, ...], text: Path) -> None:
    words = ("perplexity", embedded_model(), "--text", text, "--ctx", 64, "--json", *how)
    one, two = alone(*words), json.loads(torchrun(2, "-m", "bamba_quant_cli", *words).stdout)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0
    assert one == two


def test_a_gate_that_fails_fails_the_run_and_is_told_once(text: Path, q4: Path) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--max-kld", 0.02)
    done = torchrun(2, "-m", "bamba_quant_cli", *words, code=1)
    assert done.stderr.count("FAIL mini-q4: max-kld 0.02") == 1 and done.stdout.count("200 chunks of 64") == 1


def test_bad_input_is_told_once(text: Path, q4: Path, tmp_path: Path) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL)
    done = torchrun(2, "-m", "bamba_quant_cli", *words, "--backend", "int8", code=1)
    assert done.stderr.count("unknown backend") == 1 and not done.stdout
    done = torchrun(2, "-m", "bamba_quant_cli", *words, "--chunks", 64, code=1)
    assert done.stderr.count("more processes than parts of the text") == 1
    assert "2 processes; 64 chunks, which are parted by 64\n" in done.stderr
    assert "65 chunks or more, or one process\n" in done.stderr


@pytest.mark.parametrize("fault", ["error", "bug", "kill"])
def test_a_process_that_fails_ends_all(fault: str, text: Path, q4: Path, tmp_path: Path) -> None:
    script, saved, reports = tmp_path / "faulty.py", tmp_path / "base.kld", tmp_path / "reports"
    script.write_text(FAULTY)
    words = (
        "evaluate",
        embedded_model(),
        q4,
        "--text",
        text,
        *SMALL,
        "--save-base",
        saved,
        "--report-dir",
        reports,
    )
    done = torchrun(2, script, fault, *words, code=1)
    assert not done.stdout and list(tmp_path.iterdir()) == [script]
    said = {
        "error": "error: a tensor cannot be read",
        "bug": "KeyError: 'model.layers.2",
        "kill": f"Signal {signal.SIGKILL.value} (SIGKILL)",
    }
    assert done.stderr.count(said[fault]) == 1
    assert ("\nerror: " in f"\n{done.stderr}") == (fault == "error")
