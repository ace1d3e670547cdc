"""A directory that appears whole or not at all, and whose making an interrupt does not undo: a later run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bamba_quant.errors import OutputError
from bamba_quant.writers.directory import check_directory, flush_directory, publish, refused
from bamba_quant.writers.journal import NAME, Fingerprint, Journal


@contextmanager
def resumable_directory(
    target: Path, fingerprint: Fingerprint, *, overwrite: bool, resume: bool, n_bytes: int
) -> Iterator[tuple[Path, Journal]]:
    """A directory that becomes ``target`` when the block ends without error, and its journal.

    It lies beside ``target`` and always has the same name. With ``resume`` one that an interrupt left is taken up,
    if it was begun under the same ``fingerprint``; with ``overwrite`` alone it is begun anew. Where the journal
    lists nothing the directory is empty. An error, other than an interrupt, leaves nothing. ``target`` is
    ``atomic_directory``'s. Raises ``OutputError`` likewise, for work left over where neither is given, and for
    another run at work.
    """
    place = target.resolve()
    partial = partial_of(place)
    check_output(target, overwrite=overwrite, resume=resume, n_bytes=n_bytes)
    try:
        partial.mkdir(exist_ok=True)
        opened = Journal(partial, fingerprint, resume=resume)
    except OSError as error:
        raise refused(error, place) from error
    with opened as journal:
        try:
            if not journal.done:
                for leftover in partial.iterdir():
                    if leftover.name != NAME:
                        leftover.unlink()
            yield partial, journal
            (partial / NAME).unlink()
            flush_directory(partial)
            publish(partial, place, overwrite)
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


def check_output(target: Path, *, overwrite: bool, resume: bool, n_bytes: int) -> None:
    """Raise ``OutputError`` when a run could not begin, or go on, to make ``target``; changes nothing."""
    partial = partial_of(target)
    left = partial.is_dir()
    check_directory(target, overwrite=overwrite, n_bytes=0 if left else n_bytes)
    if left and not (overwrite or resume):
        raise OutputError(
            "an interrupted run left its work",
            where=partial,
            fix="go on with --resume, or begin anew with --overwrite",
        )
