"""Names on disk: exchanged in one step, flushed, and locked for as long as the run that writes under them lives."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

from bamba_quant.errors import OutputError

_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL)
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step: Linux renameat2, macOS renamex_np. False where that is not supported."""
    rename = _exchanger()
    if rename is None:
        return False
    while rename(os.fsencode(first), os.fsencode(second)):
        number = ctypes.get_errno()
        if number in _NO_EXCHANGE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), str(first), None, str(second))
    return True


@cache
def _exchanger() -> Callable[[bytes, bytes], int] | None:
    system = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            swap = system.renamex_np
            return lambda first, second: int(swap(first, second, ctypes.c_uint(_RENAME_SWAP)))
        rename = system.renameat2
    except AttributeError:
        return None
    here = ctypes.c_int(_AT_FDCWD)
    return lambda first, second: int(rename(here, first, here, second, ctypes.c_uint(_RENAME_EXCHANGE)))


def flush_directory(directory: Path) -> None:
    """Make new names survive a power cut as well as the files do."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Give a new file its size, with blocks reserved where the system can, so that a full disk shows early."""
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NO_ALLOCATION:
                raise


def create_locked(file: Path) -> int:
    """A descriptor of the new file ``file``, locked until it is closed. Raises ``FileExistsError``."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # without locks a file is never taken for that of a dead run
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # another run took it for dead before it was locked


def remove_dead(file: Path) -> None:
    """Remove a regular file unless its writer, which holds a lock on it, still lives."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opened = os.fstat(descriptor)
            if stat.S_ISREG(opened.st_mode) and os.path.samestat(opened, file.lstat()):
                file.unlink()
        finally:
            os.close(descriptor)


def is_own(status: os.stat_result, directory: Path) -> bool:
    """Whether a file in ``directory`` belongs to this user, as far as that file system tells users apart."""
    if status.st_uid == os.geteuid():
        return True
    with suppress(OSError), TemporaryFile(dir=directory) as made:  # a server may give all files to one user
        return os.fstat(made.fileno()).st_uid == status.st_uid
    return False


def output_error(error: OSError, file: Path | None, fix: str | None = None) -> OutputError:
    """The ``OutputError`` that tells the user what the operating system refused, with a ``fix`` or the usual one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "the disk is full",
            where=file,
            found=error.strerror,
            fix=fix or "free some space, or write elsewhere; nothing was left behind",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = fix or "write elsewhere"
    return OutputError("the output cannot be written", where=file, found=error.strerror, fix=fix)
