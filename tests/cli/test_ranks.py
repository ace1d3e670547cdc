"""Several processes under torchrun: one process's figures and files to the last bit, and one error when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bamba_quant.embedded import embedded_model
from bamba_quant.report.json_report import read_report
from tests.support.command import run
from tests.support.conversion import to_gguf

# Of the 16 that are worked on at once: three groups, the last of them not whole.
SMALL = ("--ctx", 64, "--resamples", 1000, "--floor-chunks", 2, "--drift-chunks", 1, "--chunks", 40)
# Sums of another number of threads differ in their last bits.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# Runs the command line with a fault in the second process, at a tensor of the third layer.
FAULTY = """
import os
from bamba_quant.errors import CheckpointError
from bamba_quant.inference.weights import LazyWeights
from bamba_quant_cli.app import main
rows = LazyWeights.rows
def faulty(self, name, *arguments, **more):
    if os.environ["RANK"] == "1" and ".layers.2." in name:
        raise CheckpointError("a tensor cannot be read", where=name)
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


def alone(*words: object, code: int = 0) -> dict[str, Any]:
    """What a command prints as JSON, run in this process."""
    found: dict[str, Any] = json.loads(run(*words, code=code).stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As ``ENVIRONMENT`` gives other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    bases = [tmp_path / f"{processes}.kld" for processes in (1, 3)]
    expected = alone(*words, "--save-base", bases[0], "--json")
    directory = tmp_path / "report"
    more = ("--save-base", bases[1], "--report-dir", directory, "--json")
    done = torchrun(3, "-m", "bamba_quant_cli", *words, *more)
    found = json.loads(done.stdout)
    assert comparable(found) == comparable(expected)
    assert found["run"]["command"].startswith("torchrun --nproc-per-node 3 -m bamba_quant_cli ")
    assert found["run"]["device"] == "cpu in 3 processes"
    assert bases[0].read_bytes() == bases[1].read_bytes()
    assert read_report(directory / "report.json").candidates[0].passed
    assert done.stderr.count(str(directory / "report.html")) == 1


def test_a_process_that_fails_ends_all(text: Path, q4: Path, tmp_path: Path) -> None:
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
    done = torchrun(2, script, *words, code=1)
    assert not done.stdout and list(tmp_path.iterdir()) == [script]
    assert f"\n{done.stderr}".count("\nerror: ") == done.stderr.count("error: a tensor cannot be read") == 1
