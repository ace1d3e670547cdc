"""A release on several local workers: one is killed and started again, and the bytes are those of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bamba_quant.releases import workers
from tests.release.conftest import Material, published
from tests.support.command import run


def test_workers_that_are_killed_are_started_again(
    finished: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long submitit waits for results, which a distributed file system may show late.
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    directory, killed = tmp_path / "release", [0]
    stop = threading.Event()

    def kill() -> None:
        """Kill those that work while a GGUF file is made, then all that work while the evaluation runs."""
        for task in ("q4_k_m_h", "evaluate"):
            while not stop.is_set() and not (directory / ".release" / f"{task}.lock").exists():
                time.sleep(0.01)
            for process in _workers(directory):
                os.kill(process, signal.SIGKILL)
                killed[0] += 1

    watcher = threading.Thread(target=kill)
    watcher.start()
    try:
        done = material.make(directory, "--workers", "2", "--processes", "2")
    finally:
        stop.set()
        watcher.join()
    assert killed[0] >= 2 and done.stderr.count("was killed; the task is started again") >= 2
    assert published(directory) == published(finished)


def _workers(directory: Path) -> list[int]:
    """Processes of submitit that run a task of this release, not those that watch them."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in words and str(directory).encode() in b" ".join(words):
            found.append(int(place.name))
    return found


class _Job:
    """A job that has ended: its results, or an error."""

    job_id, paths = "1", SimpleNamespace(stderr=Path("log"))

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def done(self) -> bool:
        return True

    def cancel(self) -> None:
        """Nothing runs."""

    def results(self) -> list[str]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return [self.outcome]


def test_what_workers_say(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit
    from submitit.core.utils import UncompletedJobError

    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LOOKS", 0)
    outcome: list[Any] = [UncompletedJobError("no result")]
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda self, *given: _Job(outcome[0]))
    always = material.make(tmp_path / "r", "--workers", "2", code=2)
    assert always.stderr.count("the task is started again") == 3
    assert "the workers of imatrix were killed 4 times" in always.stderr
    outcome[0] = "the disk has too little space\n  where: /x"
    assert "the disk has too little space" in material.make(tmp_path / "r", "--workers", "2", code=2).stderr
    assert (
        "has no effect without --workers"
        in run(*material.words(tmp_path / "r"), "--processes", "2", code=2).stderr
    )
    words = (*material.words(tmp_path / "r"), "--workers", "2", "--slurm", "partition=cpu")
    assert "submitit refuses this" in run(*words, code=2).stderr  # no sbatch here

    def refuse(self: Any, **given: Any) -> None:
        assert isinstance(given["timeout_min"], int)  # as submitit checks it

    monkeypatch.setattr(submitit.AutoExecutor, "__init__", lambda self, *given, **more: None)
    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", refuse)
    words = (*material.words(tmp_path / "r"), "--workers", "2", "--slurm", "timeout_min=abc")
    assert "submitit refuses this" in run(*words, code=2).stderr
