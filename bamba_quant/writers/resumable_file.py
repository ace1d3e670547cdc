"""A file that appears whole or not at all, and that a later run can complete after an interrupt.

Until then its content lies in a directory beside it, with a journal, as that of ``resumable_directory`` does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bamba_quant.errors import FetchError, OutputError
from bamba_quant.writers.atomic import check_space, check_target
from bamba_quant.writers.commit import put
from bamba_quant.writers.directory import partial_of, reserve
from bamba_quant.writers.journal import NAME, Fingerprint, Journal
from bamba_quant.writers.names import flush_directory, is_own, output_error

_CONTENT = "content"


@contextmanager
def resumable_file(
    file: Path, n_bytes: int, begun: Fingerprint, *, inputs: Collection[Path], overwrite: bool, resume: bool
) -> Iterator[tuple[int, Journal]]:
    """A descriptor of what becomes ``file`` when the block ends without error, and its journal.

    With ``resume`` the content that an interrupted run with the same fingerprint ``begun`` left is continued; with
    ``overwrite`` alone it is started again. An error leaves nothing, but an interrupt, and a ``FetchError``,
    leave what ``resume`` needs. Raises ``OutputError`` as ``atomic_files``, and
    for an interrupted run's content if neither option is given.
    """
    check_target(file, overwrite, inputs)
    place = partial_of(file)
    content, left = place / _CONTENT, place / NAME
    try:
        if place.is_dir() and any(place.iterdir()) and not (left.is_file() and is_own(left.lstat(), place)):
            raise OutputError(
                "the temporary name of the output exists and does not belong to an interrupted run",
                where=place,
                fix="move it away, or give another name for the output",
            )
        if left.is_file() and left.stat().st_size and not (overwrite or resume):
            raise OutputError(
                "an interrupted run left unfinished files",
                where=place,
                fix="continue with --resume, or start again with --overwrite",
            )
        place.mkdir(exist_ok=True)
        with Journal(place, begun, resume=resume) as journal:
            descriptor = _open(content, n_bytes, file, bool(journal.done))
            try:
                yield descriptor, journal
                os.fsync(descriptor)
                put(content, file, overwrite)
                flush_directory(file.parent)
                _remove(place)
            except FetchError as error:
                raise error.resumable() from error
            except Exception:
                _remove(place)
                raise
            finally:
                os.close(descriptor)
    except OSError as error:
        raise output_error(error, file) from error


def _open(content: Path, n_bytes: int, file: Path, resuming: bool) -> int:
    if not resuming:
        content.unlink(missing_ok=True)
        check_space([(file, n_bytes)])
        return reserve(content, n_bytes)
    if not content.is_file() or content.stat().st_size != n_bytes:
        raise OutputError(
            "the unfinished content of an interrupted run is damaged",
            where=content,
            expected=f"{n_bytes} bytes",
            fix="start again with --overwrite",
        )
    return os.open(content, os.O_RDWR)


def _remove(place: Path) -> None:
    with suppress(OSError):
        (place / _CONTENT).unlink(missing_ok=True)
        (place / NAME).unlink(missing_ok=True)
        place.rmdir()
