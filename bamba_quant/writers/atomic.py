"""Files that appear whole or not at all: written beside their final name, flushed, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.commit import partial_name, put, put_together, restore
from bamba_quant.writers.names import allocate, create_locked, flush_directory, output_error

__all__ = ["atomic_files", "check_target", "output_error", "partial_name", "write_text"]


@contextmanager
def atomic_files(
    files: Sequence[tuple[Path, int]],
    *,
    overwrite: bool,
    inputs: Collection[Path] = (),
    mark: str | None = None,
) -> Iterator[list[int]]:
    """Descriptors of new files of the given sizes, which become ``files`` when the block ends without error.

    Until then they bear ``partial_name``, with ``mark`` or one that is drawn, and are locked. What a killed run of the
    same output left is undone and removed first. Several files are of one directory and replace others together.

    Space is reserved first, so a full disk shows before the work. On any error, and on an interrupt, old files stay
    as they were and nothing new is left. Raises ``OutputError`` for a file that exists and may not be overwritten,
    that is not a regular file or is one of ``inputs``, and for a directory that cannot be written.
    """
    names = [file for file, _ in files]
    if names:
        restore(*names)
    for file in names:
        _check_target(file, overwrite, inputs)
    check_space(files)
    mark = mark or secrets.token_hex(4)
    with ExitStack() as cleanup:
        descriptors = [_reserve(file, partial_name(file, mark), size, cleanup) for file, size in files]
        try:
            yield descriptors
            for descriptor in descriptors:
                os.fsync(descriptor)
        except OSError as error:  # of a write: readers name their own files
            raise output_error(error, names[0] if len(names) == 1 else names[0].parent) from error
        _publish(names, mark, overwrite)


def write_text(file: Path, text: str, *, overwrite: bool, inputs: Collection[Path] = ()) -> None:
    """Write ``text`` as UTF-8 to ``file``, whole or not at all; errors as ``atomic_files``'."""
    raw = text.encode("utf-8")
    with (
        atomic_files([(file, len(raw))], overwrite=overwrite, inputs=inputs) as (descriptor,),
        open(descriptor, "wb", closefd=False) as stream,
    ):
        stream.write(raw)


@contextmanager
def temporary_file(output: Path, size: int) -> Iterator[tuple[Path, int]]:
    """A new file of ``size`` bytes beside ``output``, and its descriptor; removed when the block ends.

    It is named and locked as a partial file of ``output``: what a killed run leaves, the next run of the same output
    removes. Raises ``OutputError`` for a directory that cannot be written.
    """
    partial = partial_name(output, secrets.token_hex(4))
    with ExitStack() as cleanup:
        yield partial, _reserve(output, partial, size, cleanup)


def check_target(file: Path, overwrite: bool, inputs: Collection[Path]) -> None:
    """Raise ``OutputError`` when ``file`` may not be written; see ``atomic_files``.

    First undoes what a killed run left half replaced, since that decides whether the file exists.
    """
    restore(file)
    _check_target(file, overwrite, inputs)


def _check_target(file: Path, overwrite: bool, inputs: Collection[Path]) -> None:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(error, file) from error
    if not stat.S_ISREG(mode):
        raise OutputError(
            "the output exists already and is not a regular file",
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


def check_space(files: Sequence[tuple[Path, int]]) -> None:
    """Raise ``OutputError`` when the disk of ``files``, of one directory, has not the bytes of all of them."""
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
    """A descriptor of the new file ``partial`` with all its blocks reserved; ``cleanup`` closes and removes it."""
    try:
        cleanup.callback(
            partial.unlink, missing_ok=True
        )  # before it exists: an interrupt may come at any time
        descriptor = create_locked(partial)
        cleanup.callback(os.close, descriptor)
        allocate(descriptor, size)
    except OSError as error:
        raise output_error(error, file) from error
    return descriptor


def _publish(files: Sequence[Path], mark: str, overwrite: bool) -> None:
    try:
        if len(files) == 1:
            put(partial_name(files[0], mark), files[0], overwrite)
            flush_directory(files[0].parent)
        elif files:
            put_together(files, mark, overwrite)
    except FileExistsError as error:
        raise _exists(Path(error.filename2 or error.filename)) from None
    except OSError as error:
        raise output_error(error, Path(error.filename2 or error.filename or files[0])) from error
