"""A directory that appears whole or not at all, and that a later run can complete after an interrupt.

It is written beside the output, always under the same name, with a journal in it that is locked while the run lives.
The journal is renamed with the directory and removed last: an output with a journal is whole, but the directory that
it replaced may still exist. The next run removes that first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bamba_quant.errors import FetchError, OutputError
from bamba_quant.writers.directory import (
    check_apart,
    check_directory,
    empty,
    partial_of,
    publish,
    remove_replaced,
    resolve_output,
    restore_replaced,
)
from bamba_quant.writers.journal import NAME, Fingerprint, Journal, as_read, open_locked, parse, read
from bamba_quant.writers.names import flush_directory, is_own, output_error

__all__ = ["check_output", "finished", "partial_of", "resumable_directory", "settle"]


@contextmanager
def resumable_directory(
    target: Path,
    fingerprint: Fingerprint,
    *,
    inputs: Collection[Path],
    overwrite: bool,
    resume: bool,
    n_bytes: int,
) -> Iterator[tuple[Path, Journal]]:
    """A directory that becomes ``target`` when the block ends without error, and its journal.

    With ``resume`` the directory of an interrupted run with the same ``fingerprint`` is continued; with ``overwrite``
    alone it is started again. The directory is empty if the journal lists nothing. An error leaves nothing, but an
    interrupt, a ``FetchError``, and an error after everything was written, leave what ``resume`` needs. ``inputs``
    are files that neither directory may hold. Raises ``OutputError`` as ``check_directory``, and for an interrupted
    run's directory if neither option is given, for a directory of that name without a journal, and for another run at
    work.
    """
    output, partial = resolve_output(target), partial_of(target)
    check_apart((output, partial_of(output)), inputs)
    settle(output)
    _check(output, partial, overwrite=overwrite, resume=resume, n_bytes=n_bytes)
    try:
        try:
            partial.mkdir(exist_ok=True)
            opened = Journal(partial, fingerprint, resume=resume)
        except BaseException:
            with suppress(OSError):
                partial.rmdir()  # if it is empty: an interrupt before the journal leaves nothing to resume
            raise
    except OSError as error:
        raise output_error(error, output) from error
    with opened as journal:
        if not journal.is_in(partial) or _is_journal(output / NAME):
            raise OutputError("another run has just written this output", where=output, fix="run again")
        keep = False
        try:
            if not journal.done:
                empty(partial)
            yield partial, journal
            flush_directory(partial)
            keep = True
            publish(partial, output, overwrite=overwrite)
            _finish(output)
        except BaseException as error:
            keep = keep or isinstance(error, FetchError) or not isinstance(error, Exception)
            if not keep:
                with suppress(OSError, OutputError):  # the first error is raised; the next run cleans up
                    _finish(output) if journal.is_in(output) else _discard(partial, journal)
            if isinstance(error, FetchError):
                raise error.resumable() from error
            if isinstance(error, OSError):
                fix = "correct that and continue with --resume: all is written" if keep else None
                raise output_error(error, output, fix) from error
            raise


def finished(target: Path, fingerprint: Fingerprint, inputs: Collection[Path]) -> bool:
    """Whether an interrupted run with ``fingerprint`` had only to tidy up; then that is done."""
    output = resolve_output(target)
    check_apart((output, partial_of(output)), inputs)
    if not _is_journal(output / NAME):
        return False
    try:
        with _locked(output / NAME) as descriptor:
            begun, _, _ = parse(read(descriptor, output / NAME), output / NAME)
    except OSError as error:
        raise output_error(error, output) from error
    if begun != as_read(fingerprint):
        return False
    settle(output)
    return True


def settle(target: Path) -> None:
    """Finish, or undo, what a killed run left of replacing the directory ``target``.

    Raises ``OutputError`` when another run does that now, and when the system refuses.
    """
    output = resolve_output(target)
    try:
        if _is_journal(output / NAME):
            with _locked(output / NAME):
                _finish(output)
        partial = partial_of(output)
        if _is_journal(partial / NAME) and not partial.is_symlink():
            with _locked(partial / NAME):
                restore_replaced(output)
                if not (partial / NAME).stat().st_size:  # nothing to resume
                    _remove(partial)
    except OSError as error:
        raise output_error(error, output) from error


def check_output(
    target: Path, *, inputs: Collection[Path], overwrite: bool, resume: bool, n_bytes: int
) -> None:
    """Raise ``OutputError`` when a run could not start or continue to write ``target``; changes nothing."""
    output = resolve_output(target)
    check_apart((output, partial_of(output)), inputs)
    _check(output, partial_of(output), overwrite=overwrite, resume=resume, n_bytes=n_bytes)


def _check(output: Path, partial: Path, *, overwrite: bool, resume: bool, n_bytes: int) -> None:
    if output.suffix == ".partial":
        raise OutputError(
            "the output has the name of an interrupted run's unfinished files",
            where=output,
            fix="give another name",
        )
    published = _is_journal(output / NAME)
    journal = partial / NAME
    left = _is_journal(journal) and not partial.is_symlink()
    if not (left or published) and (partial.is_symlink() or (partial.exists() and not _is_empty(partial))):
        raise OutputError(
            "the temporary name of the output exists and does not belong to an interrupted run",
            where=partial,
            expected=f"nothing, or a directory with {NAME}",
            fix="move it away, or give another name for the output",
        )
    check_directory(output, overwrite=overwrite or (resume and published), n_bytes=0 if left else n_bytes)
    if left and journal.lstat().st_size and not (overwrite or resume):
        raise OutputError(
            "an interrupted run left unfinished files",
            where=partial,
            fix="continue with --resume, or start again with --overwrite",
        )


def _finish(output: Path) -> None:
    """Remove what ``output`` replaced, then the journal, whose presence says that this is left to do."""
    remove_replaced(output)
    (output / NAME).unlink()
    flush_directory(output)


def _discard(partial: Path, journal: Journal) -> None:
    journal.clear()
    _remove(partial)


def _remove(partial: Path) -> None:
    """Remove a directory whose journal is empty, that last, so that a run killed meanwhile leaves no other."""
    empty(partial)
    (partial / NAME).unlink()
    partial.rmdir()


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    descriptor = open_locked(file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_journal(file: Path) -> bool:
    """Whether ``file`` is a journal. Raises ``OutputError`` for one that another user made."""
    try:
        status = file.lstat()
    except OSError:
        return False
    if stat.S_ISREG(status.st_mode) and not is_own(status, file.parent):
        action = "check its files, then remove " + NAME  # of an output that is whole
        if file.parent.suffix == ".partial":
            action = "check the directory and move it away"
        raise OutputError(
            "another user's interrupted run left its files in this directory",
            where=file.parent,
            found=f"uid {status.st_uid}",
            expected=f"uid {os.geteuid()}",
            fix=f"{action}, or give another name for the output",
        )
    return stat.S_ISREG(status.st_mode)


def _is_empty(output: Path) -> bool:
    return output.is_dir() and not any(output.iterdir())
