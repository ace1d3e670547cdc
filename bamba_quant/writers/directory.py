"""Which directories may be written or replaced, and how a new one gets its name in one step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from bamba_quant.errors import OutputError, join_names
from bamba_quant.files.names import CHAT_TEMPLATES, COPIED
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


def resolve_output(target: Path) -> Path:
    """``target`` with links followed. Raises ``OutputError`` for a loop of links, and for the root directory."""
    try:
        output = target.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise OutputError(
            "the output's path cannot be followed", where=target, found=str(error), fix="give another name"
        ) from None
    if not output.name:
        raise OutputError("the root directory cannot be an output", where=target, fix="give another name")
    return output


def partial_of(target: Path) -> Path:
    """The directory in which a run collects what will be ``target``."""
    output = resolve_output(target)
    return output.with_name(f"{output.name}.partial")


def check_directory(target: Path, *, overwrite: bool, n_bytes: int) -> None:
    """Raise ``OutputError`` when ``target`` cannot become a new directory of ``n_bytes``; changes nothing.

    It must not exist or be empty; with ``overwrite`` it may also be a model directory.
    """
    output = resolve_output(target)
    try:
        found = sorted(output.iterdir()) if output.exists() else []
        if not output.parent.is_dir():
            raise OutputError(
                "the directory above the output does not exist", where=output.parent, fix="create it first"
            )
        free = shutil.disk_usage(output.parent).free
    except NotADirectoryError:
        raise OutputError(
            "the output exists already and is not a directory", where=output, fix="give another name"
        ) from None
    except OSError as error:
        raise output_error(error, output) from error
    if os.path.ismount(output):
        raise OutputError(
            "the output directory is a mount point, which cannot be replaced by a new directory",
            where=output,
            fix="give the name of a new directory inside it",
        )
    if found and not overwrite:
        raise _not_empty(output, [entry.name for entry in found])
    unfinished = (output / NAME).exists()
    foreign = _foreign(entry for entry in found if not (unfinished and entry.name == _OLD))
    if foreign:
        raise OutputError(
            "the output directory holds files that are not part of a model, so it is not replaced",
            where=output,
            found=join_names(foreign),
            fix="give another name, or move these files away",
        )
    if n_bytes > free:
        raise OutputError(
            "the disk has too little space",
            where=output.parent,
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
    replaced = [resolve_output(place) for place in places]
    for file in inputs:
        # A link's target is read, and the link is how it is found.
        for path in (file.absolute(), file.parent.resolve() / file.name, file.resolve()):
            for output in replaced:
                if path.is_relative_to(output):
                    raise OutputError(
                        "the output would replace the input",
                        where=output,
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


def publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Give ``partial`` its name; a directory that it replaces is left for ``remove_replaced``.

    Raises ``OutputError`` when the directory got other files in the meantime.
    """
    check_directory(output, overwrite=overwrite, n_bytes=0)
    if not output.exists() or not any(output.iterdir()):
        try:
            # Onto an empty directory a rename succeeds, onto one that was filled in the meantime it does not.
            partial.rename(output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _not_empty(output, sorted(entry.name for entry in output.iterdir())) from None
            raise
    elif not exchange(partial, output):
        output.rename(partial / _OLD)
        try:
            partial.rename(output)
        except BaseException:
            restore_replaced(output)
            raise
    flush_directory(output.parent)


def restore_replaced(output: Path) -> None:
    """Put back the directory that was to be replaced, where a run ended between moving it and its successor."""
    old = partial_of(output) / _OLD
    if not old.is_dir():
        return
    try:
        old.rename(output)
    except OSError as error:
        raise OutputError(
            "the previous output could not be put back after an interrupted run",
            where=old,
            found=error.strerror,
            fix=f"move it to {output} yourself, or elsewhere",
        ) from error
    flush_directory(output.parent)


def remove_replaced(output: Path) -> None:
    """Remove the directory that ``output`` replaced, which has either of two names, by the way of replacing."""
    for old in (output / _OLD, partial_of(output)):
        if old.is_dir() and not old.is_symlink() and not (old / NAME).exists():
            empty(old)
            old.rmdir()


def empty(directory: Path) -> None:
    """Remove all that a directory holds but its journal.

    Raises ``OutputError``, before anything is removed, where a replaced directory is in it, or a file that is not
    part of a model: a journal may have come with a downloaded directory.
    """
    if (directory / _OLD).exists():
        raise OutputError(
            "the previous output was not put back after an interrupted run",
            where=directory / _OLD,
            fix="move it to the output's name, or elsewhere",
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


def _not_empty(output: Path, entries: list[str]) -> OutputError:
    return OutputError(
        "the output directory exists already and is not empty",
        where=output,
        found=join_names(entries),
        fix="give another name, or allow replacing it with --overwrite",
    )
