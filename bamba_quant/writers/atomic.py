"""Files that appear whole or not at all: written beside their place, flushed, then put into it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bamba_quant.errors import OutputError

_RENAME_INSTEAD_OF_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def atomic_files(
    files: Sequence[tuple[Path, int]],
    *,
    overwrite: bool,
    inputs: Collection[Path] = (),
    mark: str | None = None,
) -> Iterator[list[int]]:
    """Descriptors of new files of the given sizes, which become ``files`` when the block ends without error.

    Until then they bear ``partial_name``, with ``mark`` or one drawn for each.

    Space is reserved first, so a full disk shows before the work. On any error, and on an interrupt, old files stay
    as they were and nothing new is left. Raises ``OutputError`` for a file that exists and may not be overwritten,
    that is no ordinary file or is one of ``inputs``, and for a place that cannot be written.
    """
    for file, _ in files:
        check_target(file, overwrite, inputs)
    _check_space(files)
    with ExitStack() as cleanup:
        partials, descriptors = [], []
        for file, size in files:
            partial = partial_name(file, mark or secrets.token_hex(4))
            cleanup.callback(partial.unlink, missing_ok=True)
            partials.append(partial)
            descriptors.append(_reserve(file, partial, size, cleanup))
        try:
            yield descriptors
            for descriptor in descriptors:
                os.fsync(descriptor)
        except OSError as error:  # of a write: readers name their own files
            raise output_error(error, files[0][0] if len(files) == 1 else files[0][0].parent) from error
        _publish(partials, [file for file, _ in files], overwrite)


def partial_name(file: Path, mark: str) -> Path:
    """What ``file`` is called until it is whole."""
    return file.with_name(f"{file.name}.{mark}.partial")


def output_error(error: OSError, file: Path | None) -> OutputError:
    """What a refusal of the operating system means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "the disk is full",
            where=file,
            found=error.strerror,
            fix="free some space, or write elsewhere; nothing was left behind",
        )
    fix = "write elsewhere" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None
    return OutputError("the output cannot be written", where=file, found=error.strerror, fix=fix)


def check_target(file: Path, overwrite: bool, inputs: Collection[Path]) -> None:
    """Raise ``OutputError`` when ``file`` may not be written: see ``atomic_files``."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(error, file) from error
    if not stat.S_ISREG(mode):
        raise OutputError(
            "the output is there already and is no ordinary file",
            where=file,
            fix="give another name",
        )
    if any(file.samefile(source) for source in inputs):
        raise OutputError(
            "the output would replace the file it is made from",
            where=file,
            fix="give another name",
        )
    if not overwrite:
        raise _exists(file)


def _exists(file: Path) -> OutputError:
    return OutputError(
        "the output exists already",
        where=file,
        fix="give another name, or allow replacing it with --overwrite",
    )


def _check_space(files: Sequence[tuple[Path, int]]) -> None:
    if not files:
        return
    directory = files[0][0].parent
    if not directory.is_dir():
        raise OutputError(
            "the directory of the output does not exist", where=directory, fix="create it first"
        )
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise output_error(error, directory) from error
    needed = sum(size for _, size in files)
    if needed > free:
        raise OutputError(
            "the disk has too little space",
            where=directory,
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            fix="free some space, or write elsewhere",
        )


def _reserve(file: Path, partial: Path, size: int, cleanup: ExitStack) -> int:
    """A descriptor of the new file ``partial`` with all its blocks reserved; ``cleanup`` learns to close it."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        cleanup.callback(os.close, descriptor)
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


def _publish(partials: Sequence[Path], files: Sequence[Path], overwrite: bool) -> None:
    """Put every file into its place; when one cannot be, those that are new there go again."""
    published: list[Path] = []
    try:
        for partial, file in zip(partials, files, strict=True):
            try:
                _put(partial, file, overwrite)
            except FileExistsError:
                raise _exists(file) from None
            except OSError as error:
                raise output_error(error, file) from error
            published.append(file)
    except BaseException:
        if not overwrite:
            for file in published:
                file.unlink(missing_ok=True)
        raise
    _flush_directories({file.parent for file in files})


def _put(partial: Path, file: Path, overwrite: bool) -> None:
    if overwrite:
        partial.replace(file)
        return
    try:
        # Unlike a rename, a link never replaces a file that appeared in the meantime.
        file.hardlink_to(partial)
    except OSError as error:
        if error.errno not in _RENAME_INSTEAD_OF_LINK:
            raise
        if file.exists():
            raise FileExistsError from error
        partial.rename(file)


def _flush_directories(directories: Collection[Path]) -> None:
    """So that the new names survive a power cut as well as the files do."""
    for directory in directories:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
