"""Readers that fail, each in one way: what the fuzzer must see (``--plugin tests.fuzz.planted``)."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from random import Random

import numpy as np

from bamba_reference.errors import BambaQuantError
from tests.fuzz.registry import Case, reader
from tests.fuzz.tree import Tree


def _seeds() -> list[Tree]:
    return [{"input": b"valid"}]


def _mutate(random: Random, tree: Tree) -> Tree:
    return {"input": random.randbytes(4)}


def _planted(name: str):
    return reader(name, seeds=_seeds, mutate=_mutate)


@_planted("good")
def good(case: Case) -> None:
    if not case.valid:
        raise BambaQuantError("not valid", where=case.path)


@_planted("key_error")
def key_error(case: Case) -> None:
    raise KeyError("planted")


@_planted("base_exception")
def base_exception(case: Case) -> None:
    class Panic(BaseException):
        pass

    raise Panic("as of Rust code")


@_planted("warning")
def warning(case: Case) -> None:
    warnings.warn("overflow", RuntimeWarning, stacklevel=1)


@_planted("hang")
def hang(case: Case) -> None:
    while True:
        pass


@_planted("hang_in_compiled_code")
def hang_in_compiled_code(case: Case) -> None:
    # A lock taken twice: nothing but the end of the process ends it, and the interpreter's own lock is kept.
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


@_planted("hang_at_fifo")
def hang_at_fifo(case: Case) -> None:
    os.mkfifo(case.path / "fifo")
    (case.path / "fifo").read_bytes()


@_planted("memory")
def memory(case: Case) -> None:
    np.ones(3 << 30, np.uint8)


@_planted("memory_of_the_kernel")
def memory_of_the_kernel(case: Case) -> None:
    # A shared mapping is no data of the process, and so only its peak tells.
    import mmap

    with mmap.mmap(-1, 64 << 20) as mapped:
        for _ in range(64):
            mapped.write(bytes(1 << 20))


@_planted("leftover")
def leftover(case: Case) -> None:
    (case.path / "model.gguf.1234.partial").write_bytes(b"half")


@_planted("leftover_in_working_directory")
def leftover_in_working_directory(case: Case) -> None:
    with open("stray", "w") as stream:  # noqa: PTH123
        stream.write("x")


@_planted("changed_input")
def changed_input(case: Case) -> None:
    (case.path / "input").write_bytes(b"something else")


@_planted("segfault")
def segfault(case: Case) -> None:
    ctypes.string_at(0)


@_planted("bus_error")
def bus_error(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGBUS)
    time.sleep(1)


@_planted("exit")
def exits(case: Case) -> None:
    os._exit(3)


class _LongError(BambaQuantError):
    def __str__(self) -> str:
        return ", ".join(f"name {number}" for number in range(100_000))


@_planted("long_text")
def long_text(case: Case) -> None:
    raise _LongError("names")


@_planted("refuses_valid")
def refuses_valid(case: Case) -> None:
    raise BambaQuantError("nothing is good enough")
