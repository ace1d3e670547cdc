"""The fuzzer sees every kind of failure, says how to have it again, and finds none in the readers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PLANTED = "tests.fuzz.planted"

# What each planted reader is reported as.
KINDS = {
    "key_error": "KeyError at .*planted.py:\\d+ key_error",
    "base_exception": "tests.fuzz.planted.Panic at",
    "warning": "RuntimeWarning at",
    "hang": "time at .*planted.py:\\d+ hang",
    "hang_in_compiled_code": "time at .*planted.py:\\d+ hang_in_compiled_code",
    "hang_at_fifo": "time at .*pathlib",
    "memory": "MemoryError at",
    "memory_of_the_kernel": "memory at reader memory_of_the_kernel",
    "leftover": "files left behind or changed at reader leftover",
    "leftover_in_working_directory": "files left behind or changed at reader leftover_in_working_directory",
    "changed_input": "files left behind or changed at reader changed_input",
    "segfault": "died by SIGSEGV at",
    "bus_error": "died by SIGBUS at",
    "exit": "died by exit code 3 at",
    "long_text": "long error text at",
    "refuses_valid": "valid input refused at",
}


def run(*arguments: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=600,
    )


@cache
def planted() -> str:
    """What is printed of the readers that fail, two cases each."""
    ended = run("--plugin", _PLANTED, "--cases", "34", "--seconds", "1", "--memory", "32")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("reader", KINDS)
def test_every_way_to_fail_is_reported(reader: str) -> None:
    groups = re.split(r"\n(?= *\d+ × )", planted())
    (group,) = (each for each in groups if re.search(KINDS[reader], each) and f"readers: {reader} " in each)
    again = re.search(r"again: python -m tests.fuzz --reader (\w+) --seed 0 --case \d+", group)
    assert again is not None
    assert again[1] == reader


def test_what_is_well_is_not_reported() -> None:
    assert "good" in planted()
    assert "readers: good" not in planted()


def test_one_case_again_with_its_input(tmp_path: Path) -> None:
    arguments = ("--plugin", _PLANTED, "--seed", "4", "--case", "1", "--keep", str(tmp_path))
    ended = run("--reader", "key_error", *arguments)
    assert ended.returncode == 1
    assert "Traceback" in ended.stdout
    assert "KeyError: 'planted'" in ended.stdout
    assert len((tmp_path / "key_error-4-1" / "input").read_bytes()) == 4
    ended = run("--reader", "good", *arguments)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "refused")


def test_cases_follow_from_reader_seed_and_number() -> None:
    # Sets and hashes differ between processes; inputs must not.
    first, second = (run("--digest", "--cases", "200", hash_seed=seed) for seed in ("1", "2"))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) > 20
    assert first.stdout == second.stdout


def test_readers_fail_at_nothing() -> None:
    """Of an error: the command that stands there runs its case alone; ``make fuzz`` runs many more."""
    ended = run("--seed", "1", "--cases", "1000")
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-5000:]
