"""Runs a command in a forked child, which can be killed at a moment or at a call that changes a name on disk."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamba_quant.errors import BambaQuantError
from bamba_quant.writers import directory, names
from bamba_quant_cli.app import app

_BY_NAME = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate")
_EVENTS = ("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class Kill:
    """Before or after the ``call``-th call that changes a name (from 1), or else after ``seconds``."""

    call: int = 0
    after: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.call:
            return f"{'after' if self.after else 'before'} call {self.call}"
        return f"after {self.seconds * 1000:.1f} ms"


class Calls:
    """Counts the calls that change names below ``place``, and kills this process at one of them."""

    def __init__(self, place: Path, kill: Kill) -> None:
        self._place, self._kill = os.fspath(place), kill
        self.count = self.heard = 0

    def watch(self) -> None:
        """Put a counter before and behind each function of ``os`` that changes names, and the exchange of two."""
        for name in _BY_NAME:
            setattr(os, name, self._watched(getattr(os, name), lambda *a, **k: self._concerns(a)))
        os.open = self._watched(
            os.open, lambda path, flags, *a, **k: flags & os.O_CREAT and self._concerns([path])
        )
        os.ftruncate = self._watched(os.ftruncate, lambda *a, **k: True)
        if directory.exchange is names.exchange:
            watched = self._watched(names.exchange, lambda *a, **k: True)

            def exchange(first: Path, second: Path) -> bool:
                self.heard += 1  # ctypes calls the system, and no event tells
                return bool(watched(first, second))

            directory.exchange = exchange
        sys.addaudithook(self._hear)

    def _watched(self, function: Callable[..., Any], counts: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if not counts(*arguments, **options):
                return function(*arguments, **options)
            self.count += 1
            here = self.count == self._kill.call
            if here and not self._kill.after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **options)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)

        return watched

    def _concerns(self, arguments: Any) -> bool:
        return any(
            os.fspath(each).startswith(self._place)
            for each in arguments
            if isinstance(each, str | os.PathLike)
        )

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count by the interpreter's own events, which no way of calling the system from Python avoids."""
        creates = event == "open" and arguments[2] & os.O_CREAT
        self.heard += (
            bool((event in _EVENTS or creates) and self._concerns(arguments)) or event == "os.truncate"
        )


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, -1 where it was killed, what it printed, the calls it made, and its time."""

    code: int
    output: str
    calls: int = 0
    seconds: float = 0.0


def warm(arguments: list[str]) -> None:
    """Run the command in this process, so that no child has to import and compile, and check that it may fork."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        app(arguments, standalone_mode=False)
    gc.freeze()
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, (
        "a child would lack the threads of this process"
    )


def run(
    arguments: list[str],
    place: Path,
    log: Path,
    kill: Kill = Kill(),
    disturb: Callable[[], None] | None = None,
) -> Ended:
    """The command in a child; ``disturb`` is called in it first. Code 2 is an error the product tells, 3 any other."""
    child = os.fork()
    if not child:
        with _logged(log):
            os._exit(_run(arguments, place, log, kill, disturb))
    _, status = os.waitpid(child, 0)
    output = log.read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return Ended(-1, output)
    calls, heard, seconds = log.with_suffix(".calls").read_text().split()
    assert calls == heard, f"{heard} calls change names, {calls} of them through functions that are watched"
    return Ended(os.WEXITSTATUS(status), output, int(calls), float(seconds))


def _run(arguments: list[str], place: Path, log: Path, kill: Kill, disturb: Callable[[], None] | None) -> int:
    sys.argv = ["bamba-quant", *arguments]
    calls = Calls(place, kill)
    if disturb is not None:
        disturb()
    calls.watch()
    if kill.seconds:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a process at once, as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, kill.seconds)
    started = time.perf_counter()
    try:
        app(arguments, standalone_mode=False)
        code = 0
    except BambaQuantError as error:
        print(error)
        code = 2
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 3
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - started
    sys.stdout.flush()
    sys.stderr.flush()
    log.with_suffix(".calls").write_text(f"{calls.count} {calls.heard} {seconds}")
    return code


@contextlib.contextmanager
def _logged(log: Path) -> Iterator[None]:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    yield
