"""Opens input files: regular files only, so that no pipe, device or socket is waited for or read without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bamba_quant.errors import CheckpointError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(file: Path) -> tuple[int, int]:
    """A descriptor for reading ``file``, and its size in bytes; the caller closes it.

    Raises ``CheckpointError`` for anything but a regular file, and ``OSError`` for what cannot be opened.
    """
    check_regular(file)
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(descriptor)
        _check(file, found)  # it may have been replaced since the first look
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, found.st_size


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
