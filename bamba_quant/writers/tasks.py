"""Runs many small tasks on threads, a few at a time, so that neither their inputs nor their results pile up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

Progress = Callable[[int], None]  # called with the input bytes that were processed
Task = Callable[[], int]


def default_threads() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: Iterable[Task], threads: int, progress: Progress) -> None:
    """Execute ``tasks`` on ``threads`` threads; call ``progress`` in this thread with each result.

    ``tasks`` is iterated in this thread, as threads become free. Raises the first error of any task, after all
    threads have stopped.
    """
    waiting: set[Future[int]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
        try:
            for task in tasks:
                if len(waiting) >= 2 * threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        progress(future.result())
                waiting.add(pool.submit(task))
            for future in waiting:
                progress(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
