"""Cases on several forked processes; one that hangs or dies costs its case, and another takes its place.

A worker notes in shared memory which case it is at and since when. So the parent knows what a worker died of, and ends
one that its own alarm cannot reach because it is inside of compiled code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import mmap
import os
import selectors
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.failures import Failure, cut, frames_of_dump
from tests.fuzz.limits import Limits
from tests.fuzz.registry import Reader
from tests.fuzz.runner import run_case, strict_warnings

_SLOT = struct.Struct("<qdqq")  # case, since when, accepted, refused
_GRACE = 1.5  # seconds beyond the limit, for the alarm to be heard
_MAKING = 30.0  # seconds for an input to be made, which are no reader's
_BROKEN = 70  # exit code of a worker in which the fuzzer itself failed
_JOBS_EACH = 60  # after which a worker ends and a fresh one begins, so that nothing adds up


@dataclass(frozen=True)
class Job:
    """Cases ``first`` to ``stop`` of a reader."""

    reader: str
    first: int
    stop: int


@dataclass
class Tally:
    """What came of all cases: counts by reader, and the failures."""

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.accepted.total() + self.refused.total() + len(self.failures)


@dataclass
class _Worker:
    """A forked process with its pipes, its slot, and the file for tracebacks from within signals."""

    pid: int
    jobs: int
    results: int
    slot: mmap.mmap
    trace: Path
    job: Job | None = None
    began: float = 0.0
    given: int = 0
    text: bytes = b""


def run_jobs(
    jobs: Iterable[Job],
    readers: Mapping[str, Reader],
    seed: int,
    work: Path,
    limits: Limits,
    tally: Tally,
    *,
    workers: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Run all jobs and add what comes of them to ``tally``. ``work`` is a directory for inputs, best in memory."""
    pool = _Pool(deque(jobs), readers, seed, work, limits, tally, progress)
    try:
        pool.run(workers)
    finally:
        pool.end()


class _Pool:
    def __init__(
        self,
        jobs: deque[Job],
        readers: Mapping[str, Reader],
        seed: int,
        work: Path,
        limits: Limits,
        tally: Tally,
        progress: Callable[[Tally], None],
    ) -> None:
        self._jobs, self._readers, self._seed, self._work, self._limits = jobs, readers, seed, work, limits
        self._progress = progress
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._made = 0
        self.tally = tally

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self._jobs))):
            self._start()
        while self._workers:
            for key, _ in self._selector.select(0.2):
                self._hear(key.data)
            for worker in list(self._workers):
                self._watch(worker)
            self._progress(self.tally)

    def end(self) -> None:
        """End what is left of the workers."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        self._workers.clear()

    def _start(self) -> None:
        self._made += 1
        place = self._work / f"worker-{self._made}"
        place.mkdir()
        slot = mmap.mmap(-1, _SLOT.size)
        jobs_out, jobs_in = os.pipe()
        results_out, results_in = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(jobs_in)
                os.close(results_out)
                for other in self._workers:
                    if other.jobs >= 0:
                        os.close(other.jobs)
                _work(jobs_out, results_in, slot, place, self._readers, self._seed, self._limits)
            except BaseException:  # noqa: BLE001 - of the fuzzer itself, which the parent then shows
                (place / "broken").write_text(traceback.format_exc())
                os._exit(_BROKEN)
            os._exit(0)
        os.close(jobs_out)
        os.close(results_in)
        worker = _Worker(pid, jobs_in, results_out, slot, place / "trace")
        self._workers.append(worker)
        self._selector.register(results_out, selectors.EVENT_READ, worker)
        self._give(worker)

    def _give(self, worker: _Worker) -> None:
        """The next job, or the end of jobs."""
        if not self._jobs or worker.given == _JOBS_EACH:
            worker.job = None
            os.close(worker.jobs)
            worker.jobs = -1
            return
        worker.job, worker.began = self._jobs.popleft(), time.monotonic()
        worker.given += 1
        worker.slot[:] = bytes(_SLOT.size)
        line = json.dumps([worker.job.reader, worker.job.first, worker.job.stop]) + "\n"
        os.write(worker.jobs, line.encode())

    def _hear(self, worker: _Worker) -> None:
        text = os.read(worker.results, 1 << 16)
        if not text:
            self._ended(worker)
            return
        *lines, worker.text = (worker.text + text).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if told is None:
                self._count(worker)
                self._give(worker)
            else:
                self.tally.failures.append(Failure.from_json(told))

    def _count(self, worker: _Worker) -> None:
        """Take over how many cases of the present job ended well."""
        assert worker.job is not None
        _, _, accepted, refused = _SLOT.unpack(worker.slot[:])
        self.tally.accepted[worker.job.reader] += accepted
        self.tally.refused[worker.job.reader] += refused
        self.tally.seconds[worker.job.reader] += time.monotonic() - worker.began  # type: ignore[assignment]

    def _watch(self, worker: _Worker) -> None:
        _, since, _, _ = _SLOT.unpack(worker.slot[:])
        if worker.job is None or not since or time.monotonic() - since < self._limits.waiting + _GRACE:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGUSR1)  # for its traceback
            time.sleep(0.3)
            os.kill(worker.pid, signal.SIGKILL)

    def _ended(self, worker: _Worker) -> None:
        """A worker is gone: after its last job, or in the middle of one, whose case then is a failure."""
        _, code = os.waitpid(worker.pid, 0)
        self._selector.unregister(worker.results)
        os.close(worker.results)
        self._workers.remove(worker)
        if worker.job is not None:
            number, _, _, _ = _SLOT.unpack(worker.slot[:])
            self._count(worker)
            self.tally.failures.append(self._death(worker, worker.job.reader, number, code))
            os.close(worker.jobs)
            if number + 1 < worker.job.stop:
                self._jobs.appendleft(Job(worker.job.reader, number + 1, worker.job.stop))
        shutil.rmtree(worker.trace.parent, ignore_errors=True)
        if self._jobs:
            self._start()

    def _death(self, worker: _Worker, reader: str, number: int, code: int) -> Failure:
        text = worker.trace.read_text("utf-8", "replace") if worker.trace.exists() else ""
        frames = frames_of_dump(text)
        where = frames[-1] if frames else f"reader {reader}"
        broken = worker.trace.with_name("broken")
        if broken.exists():
            last = broken.read_text("utf-8", "replace").strip().splitlines()
            return Failure(
                reader, self._seed, number, "the fuzzer failed", last[-1], cut(" / ".join(last[-8:]))
            )
        if os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL and frames:
            message = f"more than {self._limits.seconds:g} s in compiled code; ended from outside"
            return Failure(reader, self._seed, number, "time", where, message, frames)
        how = f"exit code {os.waitstatus_to_exitcode(code)}"
        if os.WIFSIGNALED(code):
            how = signal.Signals(os.WTERMSIG(code)).name
        return Failure(reader, self._seed, number, f"died by {how}", where, "the process ended", frames)


def _work(
    jobs: int,
    results: int,
    slot: mmap.mmap,
    place: Path,
    readers: Mapping[str, Reader],
    seed: int,
    limits: Limits,
) -> None:
    """A worker's whole life: jobs as lines of JSON, a line for each failure, null after each job."""
    trace = (place / "trace").open("w")
    faulthandler.enable(trace, all_threads=False)
    faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends its workers
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # libraries write there what they also raise
        os.dup2(silent, descriptor)
    strict_warnings()
    with os.fdopen(jobs) as lines:
        for line in lines:
            name, first, stop = json.loads(line)
            accepted = refused = 0
            for number in range(first, stop):
                counts = (accepted, refused)
                slot[:] = _SLOT.pack(number, time.monotonic() + _MAKING, *counts)

                def begins(number: int = number, counts: tuple[int, int] = counts) -> None:
                    slot[:] = _SLOT.pack(number, time.monotonic(), *counts)

                outcome = run_case(readers[name], seed, number, place, limits, begins)
                accepted += outcome.failure is None and outcome.accepted
                refused += outcome.failure is None and not outcome.accepted
                slot[:] = _SLOT.pack(number, 0.0, accepted, refused)
                if outcome.failure is not None:
                    _tell(results, outcome.failure.as_json())
                    gc.collect()  # which may take long where memory was the failure
            _tell(results, None)


def _tell(results: int, what: object) -> None:
    line = (json.dumps(what) + "\n").encode()
    while line:
        line = line[os.write(results, line) :]
