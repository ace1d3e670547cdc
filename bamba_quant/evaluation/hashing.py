"""SHA-256 of files, several at a time, beside other work or after it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.provenance import FileHash

_CHUNK = 1 << 22
_FILES = 4
_MOST_FILES = 8


class HashingError(BambaQuantError):
    """A file that cannot be hashed."""


class Hashing:
    """Hashes groups of files in threads from the moment it is made; what is left undone at its end is given up.

    Where there are cores to spare, half of them are taken.
    """

    def __init__(self, groups: Iterable[Sequence[Path]]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(min(_MOST_FILES, max(_FILES, (os.cpu_count() or 1) // 2)))
        self._groups = [list(files) for files in groups]
        # The largest takes longest, and so it begins first.
        files = sorted({file for group in self._groups for file in group}, key=_size, reverse=True)
        self._hashes = {file: self._pool.submit(self._hash, file) for file in files}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def finish(self) -> list[tuple[FileHash, ...]]:
        """The hashes of each group, once all are there. Raises ``HashingError`` for a file that cannot be read."""
        try:
            return [tuple(self._hashes[file].result() for file in group) for group in self._groups]
        except OSError as error:
            raise HashingError("a file cannot be read", where=error.filename, found=error.strerror) from error

    def _hash(self, file: Path) -> FileHash:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        with file.open("rb", buffering=0) as stream:
            while not self._stop.is_set() and (count := stream.readinto(buffer)):
                digest.update(buffer[:count])
        return FileHash(file.name, file.stat().st_size, digest.hexdigest())


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def hashes(files: Sequence[Path]) -> tuple[FileHash, ...]:
    """The hashes of one group."""
    with Hashing([files]) as hashing:
        return hashing.finish()[0]
