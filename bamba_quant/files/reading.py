"""Reads input files of bounded size: regular files only, so that no pipe, device or socket blocks or never ends."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bamba_quant.errors import CheckpointError

SMALL_BYTES = 64 << 20  # any other file that is read whole
# A tokenizer.json of 500,000 tokens takes about 50 MB and has 3 million items.
TOKENIZER_BYTES = 128 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True)
class RemoteFile:
    """A file of ``size`` bytes that is not on this disk; an empty file stands in its place.

    ``name`` identifies its content. ``open`` is a stream that reads ranges of it; ``fetch`` copies it to a directory,
    by default to a cache, and returns the path.
    """

    name: str
    size: int
    open: Callable[[], io.RawIOBase]
    fetch: Callable[[Path | None], Path]


REMOTE: dict[Path, RemoteFile] = {}  # by the path of the empty file


def identity(file: Path) -> tuple[str, list[int]]:
    """What tells whether ``file`` is the one of an earlier run: a name, and numbers that change with its content."""
    if remote := REMOTE.get(file):
        return remote.name, [remote.size, 0]
    found = file.stat()
    return str(file.resolve()), [found.st_size, found.st_mtime_ns]


def open_raw(file: Path) -> tuple[io.RawIOBase, int]:
    """A stream of ``file``, and its size. A remote file is read by ranges, and only where the stream is read."""
    if remote := REMOTE.get(file):
        return remote.open(), remote.size
    descriptor, size = open_regular(file)
    return os.fdopen(descriptor, "rb", 0), size


def open_regular(file: Path) -> tuple[int, int]:
    """A descriptor for reading ``file``, and its size in bytes; the caller closes it. A remote file is fetched.

    Raises ``CheckpointError`` for anything but a regular file, and ``OSError`` for what cannot be opened.
    """
    if remote := REMOTE.get(file):
        file = remote.fetch(None)
    check_regular(file)
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(descriptor)
        _check(file, found)  # it may have been replaced since the first look
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, found.st_size


@contextmanager
def opened(file: Path, purpose: str | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file open for reading, and its size in bytes; of a remote file only what is read is fetched.

    Raises ``CheckpointError`` saying its ``purpose`` when it is missing, and for a file that is not regular or cannot
    be opened; an ``OSError`` inside the block becomes one too.
    """
    try:
        raw, size = open_raw(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing", where=file.parent, expected=purpose) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(file, error) from error
    with io.BufferedReader(raw) as stream:
        try:
            yield stream, size
        except OSError as error:
            raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file.name} cannot be read", where=file, found=str(error))


def lexists(file: Path) -> bool:
    """Whether anything has this name; also a broken link or a pipe, so that reading it raises an error."""
    return os.path.lexists(file)


def check_regular(file: Path) -> None:
    """Raises as ``open_regular`` does, and opens nothing."""
    _check(file, file.stat())


def _check(file: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(
            f"{file.name} is not a regular file",
            where=file,
            found=_KINDS.get(stat.S_IFMT(found.st_mode), "a special file"),
            expected="a file on a disk",
        )


def file_changed(file: Path, found: int, expected: int) -> CheckpointError:
    """The error for a file whose size is not the one that it had when it was opened."""
    return CheckpointError(
        f"{file.name} changed while it was read",
        where=file,
        found=f"{found:,} bytes",
        expected=f"{expected:,} bytes, its size when it was opened",
        fix="run the command again when nothing writes to the file",
    )


def read_bytes(file: Path, purpose: str, limit: int = SMALL_BYTES) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises ``CheckpointError`` saying its ``purpose`` when it is missing, and for a file that is not regular, larger
    than ``limit`` or written to while it is read.
    """
    with opened(file, purpose) as (stream, size):
        if size > limit:
            raise CheckpointError(
                f"{file.name} is too large",
                where=file,
                found=f"{size:,} bytes",
                expected=f"at most {limit:,} bytes; {purpose}",
            )
        raw = stream.read(size + 1)
    if len(raw) != size:
        raise file_changed(file, len(raw), size)
    return raw


def read_text(file: Path, purpose: str, limit: int = SMALL_BYTES) -> str:
    """A small file of UTF-8 text. Raises ``CheckpointError`` for any other, and as ``read_bytes``."""
    try:
        return read_bytes(file, purpose, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(file, error) from error


def not_utf8(file: Path, error: UnicodeDecodeError) -> CheckpointError:
    """The error for a file that should be text."""
    return CheckpointError(f"{file.name} is not UTF-8 text", where=file, found=str(error), expected="UTF-8")


# Where huggingface_hub keeps content, under its SHA-1 or SHA-256.
_BLOB = re.compile(r"/models--[^/]+/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")
_ALLOWED = "a file, a link inside the directory, or one to a blob in the Hub's cache"
_FIX = "replace the link by a copy of the file, or remove it"


def check_link(file: Path, directory: Path) -> None:
    """Raise ``CheckpointError`` unless the target of ``file`` is part of the model in ``directory``.

    Links may lead into the directory itself and to blobs of the Hub's cache (models--NAME/blobs/HASH): from
    models--NAME/snapshots/COMMIT, and from any directory that older versions of huggingface_hub downloaded a model
    to. Any other link could bring any file of this machine into an output that is published.
    """
    try:
        target, inside = file.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(
            f"{file.name} is a symbolic link that cannot be followed",
            where=file,
            found=str(error),
            expected=_ALLOWED,
            fix=_FIX,
        ) from error
    if target.is_relative_to(inside) or target.parent in _blobs(inside) or _BLOB.search(target.as_posix()):
        return
    raise CheckpointError(
        f"{file.name} is a symbolic link that leaves the model's directory, and its content would be copied",
        where=file,
        found=f"a link to {target}",
        expected=_ALLOWED,
        fix=_FIX,
    )


def _blobs(inside: Path) -> list[Path]:
    return [
        snapshots.parent / "blobs"
        for snapshots in inside.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]
