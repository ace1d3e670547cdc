"""Files that appear whole or not at all: written beside their place, flushed, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.stream import output_error


@contextmanager
def atomic_files(files: Sequence[tuple[Path, int]], *, overwrite: bool) -> Iterator[list[int]]:
    """Descriptors of new files of the given sizes, which replace ``files`` when the block ends without error.

    Space is reserved first, so a full disk shows before the work. On any error, and on an interrupt, the old
    files stay as they were and nothing new is left. Raises ``OutputError`` for a file that exists and may not be
    overwritten, for a place that cannot be written, and for a second run writing the same file.
    """
    for file, _ in files:
        if file.exists() and not overwrite:
            raise OutputError(
                "the output exists already",
                where=file,
                fix="give another name with --outfile, or allow replacing it with --overwrite",
            )
    _check_space(files)
    partials = [file.with_name(file.name + ".partial") for file, _ in files]
    with ExitStack() as cleanup:
        descriptors = [
            _reserve(file, partial, size, cleanup)
            for (file, size), partial in zip(files, partials, strict=True)
        ]
        yield descriptors
        for descriptor, (file, _) in zip(descriptors, files, strict=True):
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise output_error(error, file) from error
        for partial, (file, _) in zip(partials, files, strict=True):
            partial.replace(file)


def _reserve(file: Path, partial: Path, size: int, cleanup: ExitStack) -> int:
    """A descriptor of ``partial``, of the given size and this run's alone; ``cleanup`` learns to remove it."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise output_error(error, file) from error
    cleanup.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            "another run is writing this file",
            where=file,
            fix="wait for it, or give another name with --outfile",
        ) from error
    cleanup.callback(partial.unlink, missing_ok=True)
    try:
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        _allocate(descriptor, size)
    except OSError as error:
        raise output_error(error, file) from error
    return descriptor


def _allocate(descriptor: int, size: int) -> None:
    """Reserve blocks where the system can; elsewhere the check of free space must do."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _check_space(files: Sequence[tuple[Path, int]]) -> None:
    if not files:
        return
    directory = files[0][0].parent
    if not directory.is_dir():
        raise OutputError(
            "the directory of the output does not exist", where=directory, fix="create it first"
        )
    needed, free = sum(size for _, size in files), shutil.disk_usage(directory).free
    if needed > free:
        raise OutputError(
            "the disk has too little space",
            where=directory,
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            fix="free some space, or write elsewhere with --outfile",
        )
