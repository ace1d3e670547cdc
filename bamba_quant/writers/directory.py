"""Which directories may be written or replaced, and a new one that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from bamba_quant.errors import OutputError, join_names
from bamba_quant.planning.small_files import CHAT_TEMPLATES, COPIED
from bamba_quant.writers.journal import NAME
from bamba_quant.writers.names import allocate, exchange, flush_directory, output_error

# What a model directory holds: only a directory of nothing else is ever replaced.
_REPLACEABLE = (
    "config.json",
    NAME,  # where a run ended between its last two steps
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    *COPIED,
)
# The replaced directory, inside the new one, where the system cannot exchange two names in one step.
_OLD = ".bamba-quant-old"


def place_of(target: Path) -> Path:
    """Where ``target`` is, links followed. Raises ``OutputError`` where that cannot be said."""
    try:
        place = target.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise OutputError("the output cannot be written", where=target, found=str(error)) from None
    if not place.name:
        raise OutputError("the root directory cannot be an output", where=target, fix="give another name")
    return place


def partial_of(target: Path) -> Path:
    """The directory in which a run collects what will be ``target``."""
    place = place_of(target)
    return place.with_name(f"{place.name}.partial")


def check_directory(target: Path, *, overwrite: bool, n_bytes: int) -> None:
    """Raise ``OutputError`` when ``target`` cannot become a new directory of ``n_bytes``; changes nothing.

    It must not exist or be empty; with ``overwrite`` it may also be a model directory.
    """
    place = place_of(target)
    try:
        found = sorted(place.iterdir()) if place.exists() else []
        if not place.parent.is_dir():
            raise OutputError(
                "the directory above the output does not exist", where=place.parent, fix="create it first"
            )
        free = shutil.disk_usage(place.parent).free
    except NotADirectoryError:
        raise OutputError(
            "the output exists already and is not a directory", where=place, fix="give another name"
        ) from None
    except OSError as error:
        raise output_error(error, place) from error
    if os.path.ismount(place):
        raise OutputError(
            "the output directory is a mount point, which cannot be replaced by a new directory",
            where=place,
            fix="give the name of a new directory inside it",
        )
    if found and not overwrite:
        raise _not_empty(place, [entry.name for entry in found])
    unfinished = (place / NAME).exists()
    foreign = _foreign(entry for entry in found if not (unfinished and entry.name == _OLD))
    if foreign:
        raise OutputError(
            "the output directory holds files that are not part of a model, so it is not replaced",
            where=place,
            found=join_names(foreign),
            fix="give another name, or move these files away",
        )
    if n_bytes > free:
        raise OutputError(
            "the disk has too little space",
            where=place.parent,
            found=f"{free:,} bytes free",
            expected=f"{n_bytes:,} bytes",
            fix="free some space, or write elsewhere",
        )


def _foreign(entries: Iterable[Path]) -> list[str]:
    """The names of ``entries`` of a directory that are not part of a model."""
    return [entry.name for entry in entries if not _is_of_a_model(entry)]


def _is_of_a_model(entry: Path) -> bool:
    if entry.is_dir():
        templates = entry.name == CHAT_TEMPLATES and not entry.is_symlink()
        return templates and all(each.suffix == ".jinja" and not each.is_dir() for each in entry.iterdir())
    return any(fnmatch(entry.name, known) for known in _REPLACEABLE)


def check_apart(places: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ``OutputError`` when one of ``places``, directories to be replaced, is or holds one of ``inputs``."""
    replaced = [place_of(place) for place in places]
    for file in inputs:
        # A link's target is read, and the link is how it is found.
        for path in (file.absolute(), file.parent.resolve() / file.name, file.resolve()):
            for place in replaced:
                if path.is_relative_to(place):
                    raise OutputError(
                        "the output would replace the input",
                        where=place,
                        found=f"{file} in it",
                        fix="give another name for the output",
                    )


def reserve(file: Path, size: int) -> int:
    """A descriptor of a new file with its blocks reserved where the system can, so a full disk shows early."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        allocate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def publish(partial: Path, place: Path, *, overwrite: bool) -> None:
    """Put ``partial`` into its place; a directory it replaces is left for ``remove_replaced``.

    Raises ``OutputError`` when the place was filled with anything else in the meantime.
    """
    check_directory(place, overwrite=overwrite, n_bytes=0)
    if not place.exists() or not any(place.iterdir()):
        try:
            # Onto an empty directory a rename succeeds, onto one that was filled in the meantime it does not.
            partial.rename(place)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _not_empty(place, sorted(entry.name for entry in place.iterdir())) from None
            raise
    elif not exchange(partial, place):
        place.rename(partial / _OLD)
        try:
            partial.rename(place)
        except BaseException:
            restore_replaced(place)
            raise
    flush_directory(place.parent)


def restore_replaced(place: Path) -> None:
    """Put back the directory that was to be replaced, where a run ended between moving it and its successor."""
    old = partial_of(place) / _OLD
    if not old.is_dir():
        return
    try:
        old.rename(place)
    except OSError as error:
        raise OutputError(
            "the directory that an interrupted run was replacing cannot be restored",
            where=old,
            found=error.strerror,
            fix=f"move it away, or to {place}",
        ) from error
    flush_directory(place.parent)


def remove_replaced(place: Path) -> None:
    """Remove the directory that ``place`` replaced, wherever the way of replacing left it."""
    for old in (place / _OLD, partial_of(place)):
        if old.is_dir() and not old.is_symlink() and not (old / NAME).exists():
            empty(old)
            old.rmdir()


def empty(directory: Path) -> None:
    """Remove all that a directory holds but its journal.

    Raises ``OutputError``, before anything is removed, where a replaced directory is in it, or a file that is not
    part of a model: a journal that came with the directory does not make its files this program's.
    """
    if (directory / _OLD).exists():
        raise OutputError(
            "the directory that an interrupted run was replacing is not restored", where=directory / _OLD
        )
    entries = list(directory.iterdir())
    if foreign := _foreign(entries):
        raise OutputError(
            "a directory of an interrupted run holds files that are not part of a model, so it is not removed",
            where=directory,
            found=join_names(foreign),
            fix="move these files away",
        )
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != NAME:
            entry.unlink()


def _not_empty(place: Path, entries: list[str]) -> OutputError:
    return OutputError(
        "the output directory exists already and is not empty",
        where=place,
        found=join_names(entries),
        fix="give another name, or allow replacing it with --overwrite",
    )
