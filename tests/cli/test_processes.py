"""A command that starts its processes itself: one process's figures, its own exit codes, and no process left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant_cli import processes
from tests.cli.test_ranks import ENVIRONMENT, SMALL, alone, comparable, one_thread, q4, text
from tests.support.command import run

__all__ = ["one_thread", "q4", "text"]  # fixtures


def started(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bamba_quant_cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,  # as a terminal has it: all processes of a command are one group
    )


def done(*words: object, code: int = 0) -> tuple[str, str]:
    """What a command says on both streams."""
    child = started(*words)
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


def test_figures_and_exit_codes_are_those_of_one_process(text: Path, q4: Path, tmp_path: Path) -> None:
    """From a file of logits; a gate that fails the run is told once, and so is an error that all processes meet."""
    base = tmp_path / "base.kld"
    alone("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--save-base", base, "--json")
    failing = ("evaluate", base, q4, *SMALL, "--max-kld", 0.02, "--json")
    said = done(*failing, "--processes", 2, code=1)
    found = json.loads(said[0])
    assert comparable(found) == comparable(alone(*failing, code=1))
    assert found["run"]["command"].startswith("bamba-quant evaluate ")
    assert "--processes 2" in found["run"]["command"]
    assert found["run"]["device"] == "cpu in 2 processes"
    assert said[1].count("FAIL mini-q4: max-kld 0.02") == 1
    said = done("evaluate", base, q4, *SMALL, "--chunks", 16, "--processes", 2, code=2)
    assert (
        said[1].count("error: ") == said[1].count("more processes than parts of the text") == 1
        and not said[0]
    )
    assert "2 processes; 16 chunks, which are parted by 16\n" in said[1]
    assert "17 chunks or more, or one process\n" in said[1]


def test_perplexity_is_that_of_one_process(text: Path) -> None:
    words = (
        "perplexity",
        embedded_model(),
        "--text",
        text,
        "--ctx",
        64,
        "--chunks",
        40,
        "--stream",
        "--json",
    )
    two = json.loads(done(*words, "--processes", 2)[0])
    one = alone(*words)
    assert two.pop("processes") == 2 and one.pop("processes") == 1
    assert two.pop("seconds") > 0 and one.pop("seconds") > 0
    assert two == one


def test_not_under_torchrun(text: Path, q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("evaluate", embedded_model(), q4, "--text", text, "--processes", 2)
    assert "leave one of the two out" in run(*words, code=2).stderr


@pytest.mark.parametrize("option", ["--text", "--gates"])
def test_standard_input_cannot_be_shared(option: str, text: Path, q4: Path) -> None:
    """Even where it is a file, to which /dev/stdin leads in this process and in no other."""
    words = ("evaluate", embedded_model(), q4, "--text", text, "--processes", 2, option, "/dev/stdin")
    before = os.dup(0)
    try:
        with text.open() as stdin:
            os.dup2(stdin.fileno(), 0)
        assert Path("/dev/stdin").is_file()
        said = run(*words, code=2).stderr
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert "cannot share this input\n  where: /dev/stdin\n" in said


def test_more_processes_than_the_machine_runs(text: Path, q4: Path) -> None:
    said = run("evaluate", embedded_model(), q4, "--text", text, "--processes", 4096, code=2).stderr
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
    code = "from bamba_quant_cli.processes import run_in_processes; run_in_processes(2); print('went on')"
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"BAMBA_QUANT_PROCESSES": "2/1"},
        check=False,
    )
    assert child.returncode == -signal.SIGTERM and not child.stdout


def test_a_process_that_is_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cleans up and exits with 143; out of memory it was not."""
    stand_in = tmp_path / "command"
    stand_in.write_text('#!/bin/sh\n[ "$RANK" = 1 ] && exit 143\nexec sleep 60\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(processes, "_SECONDS_TO_END", 0.1)  # it starts with signals blocked
    with pytest.raises(BambaQuantError, match="process 2 of 2, by signal 15 ") as error:
        processes._run(2, 2)
    assert "out of memory" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize(("number", "to", "code"), [(signal.SIGKILL, "one", 2), (signal.SIGINT, "all", 130)])
def test_a_process_that_is_killed_or_a_run_that_is_ended(
    number: signal.Signals, to: str, code: int, text: Path, q4: Path, tmp_path: Path
) -> None:
    """A signal to one of the two or to all: all end, and partial files are gone."""
    saved = tmp_path / "base.kld"
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--chunks", 200)
    child = started(*words, "--save-base", saved, "--processes", 2)
    both = at_work(child, saved)
    if to == "all":  # as Ctrl-C does, twice
        os.killpg(child.pid, number)
        os.killpg(child.pid, number)
    else:
        os.kill(both[1], number)
    said = ended(child, both, code)
    assert not said[0] and not list(tmp_path.iterdir())
    if to == "all":
        assert_nothing_written(said[1], "interrupted")
    else:
        assert said[1].count("error: ") == 1 and f"process 2 of 2, by signal {number.value} " in said[1]
        assert "out of memory" in said[1]


def ended(child: subprocess.Popen[str], processes: list[int], code: int) -> tuple[str, str]:
    """What the command said until its end, which is the end of its processes as well."""
    said = child.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.returncode == code
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    return said


def assert_nothing_written(said: str, word: str) -> None:
    assert said.endswith(f"{word}; nothing written\n") and said.count("nothing written") == 1
    assert "Traceback" not in said and "error" not in said


# Starts scripts in place of the command's processes, which answer a signal as those do and cost no time.
STARTER = """
import sys
from bamba_quant_cli.__main__ import main
sys.executable, *sys.argv = sys.argv[1], "bamba-quant", *sys.argv[2:]
main()
"""
PROCESS = """#!{python}
import os, signal, sys, time
from pathlib import Path
from bamba_quant_cli.processes import run_in_processes
partial = Path({place!r}) / (os.environ["RANK"] + ".partial")
def clean_up(*arguments):
    partial.unlink()
    sys.exit(143)
signal.signal(signal.SIGTERM, clean_up)
partial.touch()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
run_in_processes(2)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_process_that_starts_them_is_ended(
    number: signal.Signals, code: int, text: Path, tmp_path: Path
) -> None:
    """Those that it started end, too, each after its clean-up."""
    place, stand_in = tmp_path / "partial", tmp_path / "process"
    place.mkdir()
    stand_in.write_text(PROCESS.format(python=sys.executable, place=str(place)))
    stand_in.chmod(0o755)
    words = ("perplexity", embedded_model(), "--text", text, "--processes", 2)
    child = subprocess.Popen(
        [sys.executable, "-c", STARTER, stand_in, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(place.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    both = children(child.pid)
    assert len(both) == 2
    os.kill(child.pid, number)
    said = ended(child, both, code)
    assert not said[0] and not list(place.iterdir())
    if number == signal.SIGTERM:
        assert_nothing_written(said[1], "terminated")


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the store in /proc")
def test_a_stranger_in_the_store(text: Path, q4: Path, tmp_path: Path) -> None:
    """The store listens on loopback alone, and what another process puts into it ends the run with an error."""
    saved = tmp_path / "base.kld"
    words = ("evaluate", embedded_model(), q4, "--text", text, *SMALL, "--chunks", 70)
    child = started(*words, "--save-base", saved, "--processes", 2)
    both = at_work(child, saved)
    given = dict(
        each.split("=", 1) for each in Path(f"/proc/{both[1]}/environ").read_text().split("\0") if "=" in each
    )
    port = int(given["MASTER_PORT"])
    assert given["MASTER_ADDR"] == "127.0.0.1" and len(given["BAMBA_QUANT_TOKEN"]) == 64
    for table in ("tcp", "tcp6"):
        sockets = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        listening = [line[1] for line in sockets if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
        assert listening == ([f"0100007F:{port:04X}"] if table == "tcp" else [])
    stranger = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    harmful = pickle.dumps(Harmful(tmp_path / "ran"))
    for number in (2, 3, 4):  # of the exchanges that are still to come
        for rank in range(2):
            stranger.set(f"{number}/{rank}/read", harmful)
            stranger.set(f"{number}/{rank}/length", harmful)
            stranger.set(f"{number}/{rank}/0", harmful)
    said = child.communicate(timeout=60)
    assert child.returncode == 2 and not said[0], said
    assert said[1].count("error: a value that the processes of this run exchange was changed") == 1
    assert said[1].count("error: ") == 1 and not list(tmp_path.iterdir())
