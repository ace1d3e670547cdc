"""A directory that appears whole or not at all, and whose making an interrupt does not undo: a later run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.directory import check_apart, check_directory, flush_directory, publish, refused
from bamba_quant.writers.journal import NAME, Fingerprint, Journal


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

    It lies beside ``target`` and always has the same name. With ``resume`` one that an interrupt left is taken up,
    if it was begun under the same ``fingerprint``; with ``overwrite`` alone it is begun anew. Where the journal
    lists nothing the directory is empty. An error, other than an interrupt, leaves nothing. ``target`` is
    ``atomic_directory``'s, ``inputs`` are files that neither directory may hold. Raises ``OutputError`` likewise, for
    work left over where neither is given, for a directory of that name without a journal, and for another run at
    work.
    """
    place = target.resolve()
    partial = partial_of(place)
    check_output(target, inputs=inputs, overwrite=overwrite, resume=resume, n_bytes=n_bytes)
    try:
        partial.mkdir(exist_ok=True)
        opened = Journal(partial, fingerprint, resume=resume)
    except OSError as error:
        raise refused(error, place) from error
    with opened as journal:
        try:
            if not journal.done:
                for leftover in partial.iterdir():
                    if leftover.is_dir() and not leftover.is_symlink():
                        shutil.rmtree(leftover)
                    elif leftover.name != NAME:
                        leftover.unlink()
            yield partial, journal
            flush_directory(partial)
            publish(partial, place, overwrite)
            # Not before: a run that ends in between can go on.
            (place / NAME).unlink()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise refused(error, place) from error
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_of(target: Path) -> Path:
    """Where a run collects what will be ``target``."""
    place = target.resolve()
    return place.with_name(f"{place.name}.partial")


def check_output(
    target: Path, *, inputs: Collection[Path], overwrite: bool, resume: bool, n_bytes: int
) -> None:
    """Raise ``OutputError`` when a run could not begin, or go on, to make ``target``; changes nothing."""
    partial = partial_of(target)
    check_apart((target, partial), inputs)
    left = (partial / NAME).is_file() and not partial.is_symlink()
    if not left and (partial.is_symlink() or (partial.exists() and not _is_empty(partial))):
        raise OutputError(
            "the name under which the output is collected is taken, and not by an interrupted run",
            where=partial,
            expected=f"nothing, or a directory with {NAME}",
            fix="move it away, or give another name for the output",
        )
    check_directory(target, overwrite=overwrite, n_bytes=0 if left else n_bytes)
    if left and not (overwrite or resume):
        raise OutputError(
            "an interrupted run left its work",
            where=partial,
            fix="go on with --resume, or begin anew with --overwrite",
        )


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())
