"""What of an output is safely on disk, in a file beside it, so that an interrupted run can go on.

Its first line says what is being made of what; every further line lists chunks. A chunk is listed only after the
files that hold it were flushed, so whatever the journal says survives a power cut.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bamba_quant.errors import OutputError

NAME = ".bamba-quant-journal"
SECONDS = 0.5  # between flushes: disks write while processors work

Chunk = tuple[int, int]  # number of the tensor in the plan, first row
Fingerprint = Mapping[str, Any]


class Journal:
    """An open journal; ``done`` are the chunks it listed when it was opened, none unless ``resume``.

    Locked while open: raises ``OutputError`` when another run has it, when what it began is not what
    ``fingerprint`` says, and when it cannot be read; then it is as it was.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint, *, resume: bool) -> None:
        self._file = directory / NAME
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        self._added: list[Chunk] = []
        self._adding = threading.Lock()
        self._stop = threading.Event()
        self._error: OSError | None = None
        try:
            self._lock()
            if not resume:
                os.ftruncate(self._descriptor, 0)
            self.done = self._read(fingerprint)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    @contextmanager
    def listing(self, flush: Callable[[], None]) -> Iterator[None]:
        """List what is added, now and then and in the end, after ``flush`` flushed the files it was written to."""
        thread = threading.Thread(target=self._run, args=(flush,), name="journal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._list(flush)

    def add(self, chunk: Chunk) -> None:
        """Note that a chunk was written; any thread may."""
        with self._adding:
            self._added.append(chunk)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another run is writing this output", where=self._file.parent, fix="wait for it, or end it"
            ) from None

    def _read(self, fingerprint: Fingerprint) -> frozenset[Chunk]:
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            first, *lines = stream.read().split(b"\n")
        if not lines:  # torn before its first line was whole: nothing was begun
            os.ftruncate(self._descriptor, 0)
            self._write(dict(fingerprint))
            return frozenset()
        whole = lines[:-1]  # the last piece is empty, or was torn
        try:
            begun = dict(json.loads(first))
            done = frozenset((int(tensor), int(row)) for line in whole for tensor, row in json.loads(line))
        except (TypeError, ValueError) as error:
            raise OutputError(
                "the journal of an interrupted run is damaged",
                where=self._file,
                found=str(error),
                fix="begin anew with --overwrite",
            ) from None
        self._check(begun, json.loads(json.dumps(fingerprint)))
        os.ftruncate(self._descriptor, len(first) + 1 + sum(len(line) + 1 for line in whole))
        return done

    def _check(self, found: Fingerprint, expected: Fingerprint) -> None:
        changed = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        if changed:
            raise OutputError(
                "what was interrupted is not what would go on now",
                where=self._file.parent,
                found="another " + ", ".join(changed),
                expected="the same input, options and version",
                fix="go on as it was begun, or begin anew with --overwrite",
            )

    def _run(self, flush: Callable[[], None]) -> None:
        while not self._stop.wait(SECONDS):
            try:
                self._list(flush)
            except OSError as error:  # raised where the run ends
                self._error = error
                return

    def _list(self, flush: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        with self._adding:
            added, self._added = self._added, []
        if added:
            flush()
            self._write(added)

    def _write(self, value: Any) -> None:
        line = (json.dumps(value, separators=(",", ":")) + "\n").encode()
        os.lseek(self._descriptor, 0, os.SEEK_END)
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
