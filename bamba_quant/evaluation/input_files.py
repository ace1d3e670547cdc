"""The files that an evaluation may read: listed, so that no output replaces one, and hashed."""

from __future__ import annotations

import glob
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.provenance import FileHash

_CHUNK = 1 << 22
_FILES = 4
_MOST_FILES = 8


class HashingError(BambaQuantError):
    """A file that cannot be hashed."""


class FileHasher:
    """Hashes groups of files in threads, from its construction on; hashing that is not finished at exit is cancelled.

    It uses up to half of the cores.
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


def hash_files(files: Sequence[Path]) -> tuple[FileHash, ...]:
    """The hashes of one group of files."""
    with FileHasher([files]) as hashing:
        return hashing.finish()[0]


REPORTS = ("report.json", "report.md", "report.html")


def input_files(paths: Iterable[Path | None]) -> list[Path]:
    """The files among ``paths``, all shards of split GGUF files, and the files in directories and in theirs.

    Reports in a directory are not read, so a later evaluation may replace them.
    """
    found: list[Path] = []
    for path in paths:
        if path is not None:
            with suppress(OSError):  # what cannot be listed cannot be evaluated either, which says why
                found += _below(path)
    return found


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for pattern in ("*", "*/*"):
            yield from (file for file in path.glob(pattern) if file.is_file() and file.name not in REPORTS)
    elif path.is_file():
        yield path
        if path.suffix == ".gguf":
            stem = split_stem(path)
            yield from stem.parent.glob(f"{glob.escape(stem.name)}-*-of-*.gguf")
