"""A command that starts its processes itself: one process's figures, its own exit codes, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.embedded import embedded_model
from bamba_quant_cli import processes
from tests.cli.test_ranks import ENVIRONMENT, SMALL, alone, comparable, q4, text

__all__ = ["q4", "text"]  # fixtures


def started(*words: object, stdin: Any = None, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bamba_quant_cli", *map(str, words)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | more,
    )


def done(*words: object, code: int = 0, **more: Any) -> tuple[str, str]:
    """What a command says on both streams."""
    child = started(*words, **more)
    said = child.communicate(timeout=300)
    assert child.returncode == code, said[1]
    return said


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def at_work(child: subprocess.Popen[str], saved: Path) -> list[int]:
    """The two processes of a run, once they are inside the models: then the file of logits has begun."""
    deadline = time.monotonic() + 120
    while not list(saved.parent.glob("*.partial")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    found = children(child.pid)
    assert len(found) == 2
    return found


def test_figures_are_those_of_one_process(text: Path, q4: Path) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--json")
    found = json.loads(done(*words, "--processes", 2)[0])
    assert comparable(found) == comparable(alone(*words))
    assert found["run"]["command"].startswith("bamba-quant evaluate ")
    assert "--processes 2" in found["run"]["command"]
    assert found["run"]["device"] == "cpu in 2 processes"


def test_perplexity_is_that_of_one_process(text: Path) -> None:
    words = ("perplexity", embedded_model(), "--text", text, "--ctx", 64, "--json")
    two = json.loads(done(*words, "--processes", 2)[0])
    one = alone(*words)
    assert two.pop("processes") == 2 and one.pop("processes") == 1
    assert two.pop("seconds") > 0 and one.pop("seconds") > 0
    assert two == one


def test_exit_codes_are_the_command_s_own(text: Path, q4: Path) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--processes", 2)
    said = done(*words, "--max-kld", 0.02, code=1)
    assert said[1].count("FAIL mini-q4: max-kld 0.02") == 1 and said[0].count("200 chunks of 64") == 1
    said = done(*words, "--dtype", "int8", code=2)
    assert said[1].count("error: ") == said[1].count("no such dtype") == 1 and not said[0]


def test_not_under_torchrun(text: Path, q4: Path) -> None:
    words = ("evaluate", embedded_model(), q4, "--text", text, "--processes", 2)
    assert "leave one of the two out" in done(*words, code=2, WORLD_SIZE="2", RANK="0")[1]


@pytest.mark.parametrize("option", ["--text", "--gates"])
def test_standard_input_cannot_be_shared(option: str, text: Path, q4: Path) -> None:
    """Even where it is a file, to which /dev/stdin leads in this process and in no other."""
    words = ("evaluate", embedded_model(), q4, "--text", text, "--processes", 2, option, "/dev/stdin")
    with text.open() as stdin:
        child = started(*words, stdin=stdin)
        said = child.communicate(timeout=60)
    assert child.returncode == 2 and "cannot share this input\n  where: /dev/stdin\n" in said[1]


def test_more_processes_than_the_machine_runs(text: Path, q4: Path) -> None:
    said = done("evaluate", embedded_model(), q4, "--text", text, "--processes", 4096, code=2)[1]
    assert "--processes 4096" in said and "more processes than processors" in said


def test_the_code_of_the_process_that_says_why() -> None:
    """The others may end before it."""
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", f"import time; time.sleep({seconds}); raise SystemExit({code})"]
        )
        for seconds, code in ((0, 75), (0.5, 1))
    )
    try:
        assert processes._first_to_fail([first, second]) == 0
        assert processes._own_code([first, second]) == 1
        assert processes._own_code([first]) == 2
    finally:
        second.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_who_started_a_process_may_be_gone_already() -> None:
    code = "from bamba_quant_cli.processes import share; share(2); print('went on')"
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"BAMBA_QUANT_PROCESSES": "2/1"},
        check=False,
    )
    assert child.returncode == -signal.SIGTERM and not child.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize(
    ("number", "to_one", "code"),
    [
        (signal.SIGKILL, True, 2),
        (signal.SIGTERM, True, 2),
        (signal.SIGTERM, False, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_a_process_that_is_killed_or_a_run_that_is_ended(
    number: signal.Signals, to_one: bool, code: int, text: Path, q4: Path, tmp_path: Path
) -> None:
    """A signal to one of the two, or to what started them: all end, and what they had begun to write is gone."""
    saved = tmp_path / "base.kld"
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--save-base", saved, "--processes", 2)
    child = started(*words)
    both = at_work(child, saved)
    os.kill(both[1] if to_one else child.pid, number)
    said = child.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.returncode == code
    assert not any(Path(f"/proc/{process}").exists() for process in both)
    assert not said[0] and not list(tmp_path.iterdir())
    if to_one:
        assert said[1].count("error: ") == 1 and f"process 2 of 2, by signal {number.value} " in said[1]
        assert ("out of memory" in said[1]) == (number == signal.SIGKILL)
