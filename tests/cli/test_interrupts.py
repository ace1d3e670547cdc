"""Signals to a command: its clean-up is done, one line is said, and the exit code is the shell's for the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from bamba_quant.errors import OutputError
from bamba_quant_cli import interrupts
from bamba_quant_cli.interrupts import (
    SIGNALS,
    STARTED,
    announce_outputs,
    block_signals,
    set_interrupt_message,
)

INTERRUPTED = "interrupted; nothing written\n"


def tell(number: int = signal.SIGINT) -> None:
    """Send a signal to this process, and let its handler run."""
    os.kill(os.getpid(), number)
    time.sleep(0.001)


def ran(command: Callable[[], None], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The exit code and stderr of a process that runs ``command`` as the command line does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stderr = os.fdopen(write, "w", buffering=1)
            before()
            interrupts.run(command)
            code = 0
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_one_line_and_the_signals_exit_code(number: signal.Signals) -> None:
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert ran(lambda: tell(number)) == (128 + number, f"{word}; nothing written\n")


def test_a_command_that_is_not_interrupted() -> None:
    assert ran(lambda: None) == (0, "")
    assert ran(lambda: sys.exit(3)) == (3, "")


@pytest.mark.parametrize("second", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_does_not_disturb_the_clean_up(second: signal.Signals, tmp_path: Path) -> None:
    def command() -> None:
        try:
            (tmp_path / "x.partial").touch()
            tell()
        finally:
            tell(second)
            with suppress(OSError):
                raise OSError
            (tmp_path / "x.partial").unlink()

    assert ran(command) == (130, INTERRUPTED)
    assert not list(tmp_path.iterdir())


def test_a_third_interrupt_ends_a_clean_up_that_hangs() -> None:
    def command() -> None:
        try:
            tell()
        finally:
            tell()
            tell()
            time.sleep(60)

    code, said = ran(command)
    assert (code, said.count("\n")) == (130, 1) and "the clean-up was cut short" in said


def test_an_interrupt_that_a_library_swallows_is_raised_again() -> None:
    def command() -> None:
        try:
            tell()
        except:  # noqa: E722
            time.sleep(0)
        time.sleep(60)

    began = time.monotonic()
    assert ran(command) == (130, INTERRUPTED)
    assert time.monotonic() - began < 20


def test_an_interrupt_in_a_finalizer_is_raised_again() -> None:
    class Finalized:
        def __del__(self) -> None:
            tell()

    def command() -> None:
        Finalized()
        time.sleep(60)

    assert ran(command) == (130, INTERRUPTED)


def test_an_interrupt_does_not_disturb_the_clean_up_after_an_error(tmp_path: Path) -> None:
    def command(seconds: float) -> None:
        try:
            (tmp_path / "x.partial").touch()
            raise OSError
        except OSError:
            tell()
            (tmp_path / "x.partial").unlink()
            time.sleep(seconds)
            sys.exit(2)

    assert ran(lambda: command(0)) == (2, "") and not list(tmp_path.iterdir())
    assert ran(lambda: command(60)) == (130, INTERRUPTED)


def test_what_a_library_makes_of_an_interrupt_is_one() -> None:
    def command() -> None:
        with interrupts.preserve_interrupt():
            try:
                tell()
            except BaseException as error:
                raise RuntimeError("a callback failed") from error

    def swallowed() -> None:  # as torch does when numpy's import is interrupted, which fails the next time
        try:
            tell()
        except:  # noqa: E722
            time.sleep(0)
        raise RuntimeError("half imported")

    assert ran(command) == ran(swallowed) == (130, INTERRUPTED)


def test_a_clean_up_that_fails_is_told() -> None:
    def command() -> None:
        with interrupts.preserve_interrupt():
            try:
                tell()
            finally:
                raise OutputError("the output cannot be written", where="/x")

    assert ran(command) == (130, "interrupted; the clean-up failed: the output cannot be written\n")


def test_threads_at_work_do_not_change_the_end() -> None:
    def command() -> None:
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                pool.submit(time.sleep, 0.2)
            threading.Timer(0.05, tell).start()
            time.sleep(60)

    assert ran(command) == (130, INTERRUPTED)


def test_signals_wait_while_they_are_held() -> None:
    def command() -> None:
        with block_signals():
            tell(signal.SIGTERM)
            print("held", file=sys.stderr)
        print("not reached", file=sys.stderr)

    assert ran(command) == (143, "held\nterminated; nothing written\n")


def test_signals_that_were_blocked_arrive_when_they_can_be_handled() -> None:
    """A process of --processes begins so."""

    def blocked() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        tell()

    assert ran(lambda: time.sleep(60), blocked) == (130, INTERRUPTED)


def test_signals_that_nohup_ignores_stay_ignored() -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert ran(lambda: tell(signal.SIGHUP), nohup) == (0, "")


def test_what_was_written_is_told(tmp_path: Path) -> None:
    new, old, made = tmp_path / "new", tmp_path / "old", tmp_path / "made"
    old.write_text("as it was")

    def command(*done: Path) -> None:
        announce_outputs(new, None, old, made)
        for path in done:
            path.write_text("now")
        if not done:
            made.mkdir()
        tell()

    assert ran(command) == (130, f"interrupted; written and complete: {made}\n")
    assert ran(lambda: command(new)) == (130, f"interrupted; written and complete: {new}\n")
    assert ran(lambda: command(new, old)) == (130, f"interrupted; written and complete: {new} and 1 more\n")


def test_what_is_left_to_go_on_with_is_told(tmp_path: Path) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"

    def command() -> None:
        announce_outputs(target, unfinished=partial)
        tell()

    assert ran(command) == (130, INTERRUPTED)
    partial.mkdir()
    kept = f"interrupted; finished parts are kept in {partial}; continue with --resume"
    assert ran(command) == (130, f"{kept}\n")
    target.mkdir()
    assert ran(command) == (130, f"{kept} --overwrite\n")


def test_names_do_not_act_on_a_terminal() -> None:
    def command() -> None:
        set_interrupt_message(lambda: "a\x1b]0;title\x07\nb\udcff")
        tell()

    assert ran(command) == (130, "interrupted; a\\u001b]0;title\\u0007\\nb\\udcff\n")


@pytest.mark.parametrize(("variable", "value"), [(STARTED, "2/1"), ("RANK", "1")])
def test_one_of_several_processes_speaks(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert ran(tell) == (130, "")
    monkeypatch.setenv(variable, "0")
    assert ran(tell)[1] == (INTERRUPTED if variable == "RANK" else "")


def test_a_stderr_that_is_closed() -> None:
    def closed() -> None:
        sys.stderr.close()
        tell()

    def missing() -> None:
        sys.stderr = None  # type: ignore[assignment]
        tell()

    assert ran(closed) == ran(missing) == (130, "")


ENDING = """
import atexit, os, signal, time
from bamba_quant_cli import interrupts
def late():
    for number in interrupts.SIGNALS:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
atexit.register(late)
class Late:
    def __del__(self):
        late()
kept = Late()
interrupts.run(lambda: {what})
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("print('done')", 0, ""), ("os.kill(os.getpid(), 15) or time.sleep(60)", 143, "terminated; nothing written\n")],
)  # fmt: skip
def test_signals_while_the_interpreter_ends(what: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(what=what)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("| true", 141),
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        (">/dev/full", 2),
        ("2>/dev/full", 0),
        ("/nowhere 2>&-", 2),
        ("/nowhere 2>/dev/full", 2),
    ],
)
def test_streams_that_are_closed_or_broken(redirected: str, code: int) -> None:
    words = "inspect" if "nowhere" in redirected else "--version"
    command = f"(sleep 0.1; exec {sys.executable} -m bamba_quant_cli {words} {redirected.replace('|', ') |')}"
    command += "" if "|" in redirected else ")"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (redirected == ">/dev/full")
