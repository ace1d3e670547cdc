"""Who is told when a kernel for the CPU is compiled; imports neither numba nor torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# What is called before a kernel is compiled, and with the seconds once it is compiled or loaded; on any thread.
_listeners: list[tuple[Callable[[], None], Callable[[float], None]]] = []


@contextmanager
def listen(compiling: Callable[[], None], done: Callable[[float], None]) -> Iterator[None]:
    """Have ``compiling()`` called before a kernel is compiled that no cache holds, and ``done(seconds)`` after each
    kernel that was compiled or loaded from the cache.
    """
    listener = (compiling, done)
    _listeners.append(listener)
    try:
        yield
    finally:
        with suppress(ValueError):
            _listeners.remove(listener)


@contextmanager
def timed() -> Iterator[None]:
    """Around the compilation or loading of a kernel."""
    started = time.perf_counter()
    try:
        yield
    finally:
        for _, done in tuple(_listeners):
            done(time.perf_counter() - started)


def tell() -> None:
    """A kernel is about to be compiled."""
    for compiling, _ in tuple(_listeners):
        compiling()
