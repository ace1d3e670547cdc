"""A journal of the chunks of an output that are safely on disk, so that an interrupted run can be resumed.

Its first line says what is being made of what; every further line lists chunks. A chunk is listed only after the
files that hold it were flushed, so whatever the journal says survives a power cut. An empty journal says that nothing
was begun that could be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bamba_quant.errors import OutputError

NAME = ".bamba-quant-journal"
_MOST_BYTES = 16 << 20  # twenty bytes a chunk of 4 MiB: three terabytes of input
SECONDS = 0.5  # between flushes: disks write while processors work

Chunk = tuple[int, int]  # number of the tensor in the plan, first row
Fingerprint = Mapping[str, Any]


class Journal:
    """An open journal; ``done`` are the chunks it listed when it was opened, none unless ``resume``.

    Locked while open: raises ``OutputError`` when another run has it, when
    what it began is not what ``fingerprint`` says, and when it cannot be read; then the journal is not changed.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint, *, resume: bool) -> None:
        self._file = directory / NAME
        self._descriptor = open_locked(self._file, os.O_CREAT)
        self._added: list[Chunk] = []
        self._adding = threading.Lock()
        self._stop = threading.Event()
        self._error: OSError | None = None
        try:
            self.done = self._begin(fingerprint, resume)
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

    def clear(self) -> None:
        """Take back all that was listed, before the files that hold it are removed."""
        os.ftruncate(self._descriptor, 0)

    def forget(self) -> None:
        """Take back all that was listed, but not what was begun: what went on from here would begin anew."""
        found = read(self._descriptor, self._file)
        os.ftruncate(self._descriptor, found.find(b"\n") + 1)
        os.fsync(self._descriptor)

    def is_in(self, directory: Path) -> bool:
        """Whether the journal now lies in ``directory``."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), (directory / NAME).lstat())
        except FileNotFoundError:
            return False

    def _begin(self, fingerprint: Fingerprint, resume: bool) -> frozenset[Chunk]:
        if not resume:
            self.clear()
        begun, done, whole = parse(read(self._descriptor, self._file), self._file)
        if begun is not None:
            self._check(begun, as_read(fingerprint))
        os.ftruncate(self._descriptor, whole)
        if begun is None:
            self._write(dict(fingerprint))
        return done

    def _check(self, found: Fingerprint, expected: Fingerprint) -> None:
        changed = [key for key in expected if found.get(key) != expected[key]]
        if found.keys() - expected.keys():
            changed.append("entries")
        if changed:
            raise OutputError(
                "the interrupted run had another input, other options or another version",
                where=self._file.parent,
                found="another " + ", ".join(changed),
                expected="the same input, options and version",
                fix="use the same command again, or start again with --overwrite",
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


def open_locked(file: Path, flags: int = 0) -> int:
    """A descriptor of a journal, locked. Raises ``OutputError`` when another run has it, ``OSError`` likewise."""
    descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            "another run is writing this output", where=file.parent, fix="wait for it, or end it"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise


def read(descriptor: int, file: Path) -> bytes:
    """The bytes of an open journal. Raises ``OutputError`` for one that is too large or not a regular file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise _damaged(file, "not a regular file")
    if status.st_size > _MOST_BYTES:
        raise _damaged(
            file, f"{status.st_size:,} bytes, more than the {_MOST_BYTES:,} that a journal may have"
        )
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        return stream.read(_MOST_BYTES)


def parse(raw: bytes, file: Path) -> tuple[Fingerprint | None, frozenset[Chunk], int]:
    """What was begun, the chunks that are done, and the bytes up to the last whole line, behind which it was torn.

    None was begun where not even the first line is whole. Raises ``OutputError`` for anything else.
    """
    whole = raw.rfind(b"\n") + 1
    if not whole:
        return None, frozenset(), 0
    first, *lines = raw[: whole - 1].split(b"\n")
    try:
        begun = json.loads(first)
        if not isinstance(begun, dict):
            raise ValueError("the first line is not an object")
        return begun, frozenset(chunk for line in lines for chunk in _chunks(line)), whole
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from None


def _chunks(line: bytes) -> Iterator[Chunk]:
    listed = json.loads(line)
    if not isinstance(listed, list):
        raise ValueError("a line is not a list of chunks")
    for chunk in listed:
        if not isinstance(chunk, list) or len(chunk) != 2 or any(type(n) is not int or n < 0 for n in chunk):
            raise ValueError("a chunk is not two whole numbers")
        yield chunk[0], chunk[1]


def as_read(fingerprint: Fingerprint) -> Fingerprint:
    """``fingerprint`` as JSON gives it back."""
    found: Fingerprint = json.loads(json.dumps(fingerprint))
    return found


def _damaged(file: Path, found: str) -> OutputError:
    return OutputError(
        "the journal of an interrupted run is damaged",
        where=file,
        found=found[:200],
        fix="start again with --overwrite",
    )
