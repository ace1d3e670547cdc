"""Run a command in several processes of one machine that share its text, as torchrun does, with its exit code."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.distributed import TOKEN
from bamba_quant_cli.interrupts import STARTED, block_signals

# With which one of them ends when another has said why.
_FAILED_ELSEWHERE = 75
# A machine may have this many GPUs, even with fewer processors.
_AT_LEAST_ALLOWED = 8
# What is another file, or none, in each process.
_NO_FILES = (Path("/dev/stdin"), Path("/dev/fd"), Path("/proc"))
_SECONDS_BETWEEN_LOOKS = 0.05
# In which others meet by themselves what made one fail, before they are ended.
_SECONDS_TO_FAIL = 3.0
# Time for processes that are ended to remove partial output.
_SECONDS_TO_END = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_in_processes(count: int, *files: Path | None) -> None:
    """Return in each of ``count`` processes that run this command line, which reads ``files``; of one at once.

    The process that starts them ends here, with the exit code of the one that said why it failed, or with 0. Raises
    ``BambaQuantError`` when one is killed, under torchrun, which starts processes itself, for more of them than the
    machine has processors, and for a file that can be read but once.
    """
    if count == 1:
        return
    started, _, starter = os.environ.get(STARTED, "").partition("/")
    if starter and started == str(count):
        _end_with_parent(int(starter))
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise BambaQuantError(
            "this command already runs in several processes",
            found=f"--processes {count}, and WORLD_SIZE={os.environ['WORLD_SIZE']} as torchrun sets it",
            fix="leave one of the two out",
        )
    from bamba_quant.writers.tasks import default_threads

    most = max(_AT_LEAST_ALLOWED, default_threads())
    if count > most:
        raise BambaQuantError(
            "there are more processes than processors to run them",
            found=f"--processes {count}",
            expected=f"at most {most} on this machine",
            fix="give as many as there are GPUs, or processors where there is none",
        )
    for file in files:
        own = file and any(file.absolute().is_relative_to(place) for place in _NO_FILES)
        if file and (own or (file.exists() and not file.is_file())):
            raise BambaQuantError(
                "several processes cannot share this input",
                where=file,
                found="a stream of the process that starts them" if own else "not a regular file",
                expected="a file that every process can read by its name",
                fix="name the file, or leave out --processes",
            )
    raise typer.Exit(_run(count, default_threads()))


def code_elsewhere() -> int:
    """The exit code of a process of a run that has failed in another, which has said why."""
    return _FAILED_ELSEWHERE if STARTED in os.environ else 2


def _run(count: int, processors: int) -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    environment = os.environ | {
        STARTED: f"{count}/{os.getpid()}",
        # In /proc, too, only this user and root can read it.
        TOKEN: secrets.token_hex(32),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        # The store is this process's, so that it outlives whichever of the others fails first.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, processors // count)))
    children: list[subprocess.Popen[bytes]] = []
    store = None
    try:
        with (
            block_signals()
        ):  # else one could start without being known here, or be interrupted before it can clean up
            for rank in range(count):
                children.append(
                    subprocess.Popen(
                        # -P: what lies in the working directory is not imported, as this process does not.
                        [sys.executable, "-P", "-m", "bamba_quant_cli", *sys.argv[1:]],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                    )
                )
        store = _store(listener)
        failed = _first_to_fail(children)
        if failed is None:
            return 0
        code = children[failed].returncode
        # A process that a signal ends exits with 128 and its number.
        number = -code if code < 0 else code - 128
        if number > 0 and number != signal.SIGPIPE:
            raise BambaQuantError(
                "a process of this run was killed",
                found=f"process {failed + 1} of {count}, by signal {number} ({signal.strsignal(number)})",
                fix="find out what ended it; the others were ended, and their partial output was removed"
                + ("; it may have run out of memory" if number == signal.SIGKILL else ""),
            )
        return _own_code(children)
    finally:
        with block_signals():
            _end(children)
        del store


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have all processes end: each cleans up, and is silent about it."""
    for child in children:
        child.terminate()
    _wait(children, _SECONDS_TO_END)
    for child in children:
        child.kill()
        child.wait()


def _end_with_parent(parent: int) -> None:
    """On Linux, end this process when the one that started it ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it had ended before
            os.kill(os.getpid(), signal.SIGTERM)


def _first_to_fail(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The number of the first process to end with an error; None once all have ended without."""
    while True:
        codes = [child.poll() for child in children]
        for number, code in enumerate(codes):
            if code:
                return number
        if None not in codes:
            return None
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _own_code(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of a process that printed its error, of those that fail within some seconds; else 2."""
    _wait(children, _SECONDS_TO_FAIL)
    codes = (child.poll() for child in children)
    return next((code for code in codes if code and code > 0 and code != _FAILED_ELSEWHERE), 2)


def _wait(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Give the processes so long to end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _store(listener: socket.socket) -> Any:
    """The store through which the processes find one another, which import torch at the same time."""
    from torch.distributed import TCPStore

    host, port = listener.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
