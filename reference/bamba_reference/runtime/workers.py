"""Threads that each run whole pieces of work on a CPU, such as a layer over some texts.

Threads that share every operation wait for each other after each of them; on a busy machine, where one of them has lost
its processor, all of them do. Pieces of work that share nothing wait only at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Self, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_numbers, _running = count(), threading.local()


def piece_number() -> int:
    """The number of the piece of work that runs in this thread: pieces count in the order of ``submit``.

    Sums over pieces that are added in the order of these numbers have the same bits in every run.
    """
    number: int = _running.number
    return number


class Workers:
    """A pool for at most ``pieces`` pieces of work at a time, which divides torch's threads among them.

    With one thread, one piece, within another piece of work, or on another device than a CPU, ``submit`` runs a piece
    at once in the calling thread.
    While the pool exists, torch's number of threads is that of one piece, and afterwards what it was.
    """

    def __init__(self, device: torch.device, pieces: int) -> None:
        self._threads = torch.get_num_threads()
        alone = device.type != "cpu" or getattr(_running, "number", None) is not None
        self.count = 1 if alone else max(1, min(self._threads, pieces))
        self._pool = ThreadPoolExecutor(self.count, "worker") if self.count > 1 else None

    def __enter__(self) -> Self:
        if self._pool:
            # torch's setting for threads that start later, which is OpenMP's own in each thread.
            torch.set_num_threads(self._threads // self.count)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)

    def submit(self, piece: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """The future result of ``piece(*arguments)``, computed without gradients."""
        number = next(_numbers)
        if self._pool:
            return self._pool.submit(_run, number, piece, arguments)
        done: Future[Result] = Future()
        done.set_result(_run(number, piece, arguments))
        return done

    def map(self, piece: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of ``piece`` in the items' order; few of them wait to be taken at a time."""
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(self.submit(piece, item))
            if len(waiting) > self.count or not self._pool:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _run(number: int, piece: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    around = getattr(_running, "number", None)
    _running.number = number
    try:
        with torch.no_grad():  # which holds in one thread
            return piece(*arguments)
    finally:
        _running.number = around
