"""A directory that appears whole or not at all, and whose making an interrupt need not undo: a later run goes on.

It is collected beside its place, always under the same name, with a journal in it that is locked while the run lives.
The journal moves into place with the directory and is removed last: a directory in its place with a journal is whole,
and what it replaced may be left to remove. The next run does that first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.directory import (
    check_apart,
    check_directory,
    empty,
    partial_of,
    place_of,
    publish,
    remove_replaced,
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

    With ``resume`` one that an interrupt left is taken up, if it was begun under the same ``fingerprint``; with
    ``overwrite`` alone it is begun anew. Where the journal
    lists nothing the directory is empty. An error leaves nothing, but an interrupt, and an error once all is written,
    leave what ``resume`` needs. ``target`` is ``check_directory``'s, ``inputs`` are files that neither directory may
    hold. Raises ``OutputError`` likewise, for work left over where neither is given, for a directory of that name
    without a journal, and for another run at work.
    """
    place, partial = place_of(target), partial_of(target)
    check_apart((place, partial_of(place)), inputs)
    settle(place)
    _check(place, partial, overwrite=overwrite, resume=resume, n_bytes=n_bytes)
    try:
        partial.mkdir(exist_ok=True)
        opened = Journal(partial, fingerprint, resume=resume)
    except OSError as error:
        raise output_error(error, place) from error
    with opened as journal:
        if not journal.is_in(partial) or _is_journal(place / NAME):
            raise OutputError("another run has just written this output", where=place, fix="run again")
        keep = False
        try:
            if not journal.done:
                empty(partial)
            yield partial, journal
            flush_directory(partial)
            keep = True
            publish(partial, place, overwrite=overwrite)
            _finish(place)
        except BaseException as error:
            keep = keep or not isinstance(error, Exception)
            if not keep:
                with suppress(OSError, OutputError):  # the first error is told; the next run goes on here
                    _finish(place) if journal.is_in(place) else _discard(partial, journal)
            if isinstance(error, OSError):
                fix = "correct that and go on with --resume: all is written" if keep else None
                raise output_error(error, place, fix) from error
            raise


def finished(target: Path, fingerprint: Fingerprint, inputs: Collection[Path]) -> bool:
    """Whether an interrupted run with ``fingerprint`` had only to tidy up; then that is done."""
    place = place_of(target)
    check_apart((place, partial_of(place)), inputs)
    if not _is_journal(place / NAME):
        return False
    try:
        with _locked(place / NAME) as descriptor:
            begun, _, _ = parse(read(descriptor, place / NAME), place / NAME)
    except OSError as error:
        raise output_error(error, place) from error
    if begun != as_read(fingerprint):
        return False
    settle(place)
    return True


def settle(target: Path) -> None:
    """Finish, or undo, what a killed run left of replacing the directory ``target``.

    Raises ``OutputError`` when a run is at it, and for what the system refuses.
    """
    place = place_of(target)
    try:
        if _is_journal(place / NAME):
            with _locked(place / NAME):
                _finish(place)
        partial = partial_of(place)
        if _is_journal(partial / NAME) and not partial.is_symlink():
            with _locked(partial / NAME):
                restore_replaced(place)
                if not (partial / NAME).stat().st_size:  # nothing to resume
                    _remove(partial)
    except OSError as error:
        raise output_error(error, place) from error


def check_output(
    target: Path, *, inputs: Collection[Path], overwrite: bool, resume: bool, n_bytes: int
) -> None:
    """Raise ``OutputError`` when a run could not begin, or go on, to make ``target``; changes nothing."""
    place = place_of(target)
    check_apart((place, partial_of(place)), inputs)
    _check(place, partial_of(place), overwrite=overwrite, resume=resume, n_bytes=n_bytes)


def _check(place: Path, partial: Path, *, overwrite: bool, resume: bool, n_bytes: int) -> None:
    if place.suffix == ".partial":
        raise OutputError(
            "the output has the name of an interrupted run's unfinished files",
            where=place,
            fix="give another name",
        )
    published = _is_journal(place / NAME)
    journal = partial / NAME
    left = _is_journal(journal) and not partial.is_symlink()
    if not (left or published) and (partial.is_symlink() or (partial.exists() and not _is_empty(partial))):
        raise OutputError(
            "the temporary name of the output exists and does not belong to an interrupted run",
            where=partial,
            expected=f"nothing, or a directory with {NAME}",
            fix="move it away, or give another name for the output",
        )
    check_directory(place, overwrite=overwrite or (resume and published), n_bytes=0 if left else n_bytes)
    if left and journal.lstat().st_size and not (overwrite or resume):
        raise OutputError(
            "an interrupted run left unfinished files",
            where=partial,
            fix="continue with --resume, or start again with --overwrite",
        )


def _finish(place: Path) -> None:
    """Remove what ``place`` replaced, then the journal, whose presence says that this is left to do."""
    remove_replaced(place)
    (place / NAME).unlink()
    flush_directory(place)


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
        raise OutputError(
            "the journal of an interrupted run belongs to another user",
            where=file,
            found=f"user number {status.st_uid}",
            expected=f"user number {os.geteuid()}",
            fix="check the files in its directory, then remove the journal; or give another name for the output",
        )
    return stat.S_ISREG(status.st_mode)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())
