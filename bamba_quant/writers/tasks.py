"""Runs many small tasks on threads, a few at a time, so that neither their inputs nor their results pile up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

Progress = Callable[[int], None]
Task = Callable[[], int]


def run_tasks(tasks: Iterable[Task], threads: int, progress: Progress) -> None:
    """Execute ``tasks`` on ``threads`` threads; ``progress``, in this one, is told what each of them returns.

    ``tasks`` is drawn from in this thread, as threads become free. Raises the first error any task met, once no
    thread is at work any more.
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
