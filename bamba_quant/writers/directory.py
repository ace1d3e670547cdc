"""A directory that appears whole or not at all: filled beside its place, flushed, then renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from bamba_quant.errors import OutputError, listed
from bamba_quant.writers.journal import NAME

CHAT_TEMPLATES = "additional_chat_templates"  # transformers' directory for all but the default one
# Small files that belong to a model whatever its weights are: a quantized copy of the model has them too.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",  # those of CHAT_TEMPLATES, too
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# What a model directory holds: only a directory of nothing else is ever replaced.
_REPLACEABLE = (
    "config.json",
    NAME,  # where a run ended between its last two steps
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    *COPIED,
)


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool, n_bytes: int) -> Iterator[Path]:
    """A new empty directory, which becomes ``target`` when the block ends without error.

    ``target`` must not exist or be empty; with ``overwrite`` it may also be a model directory, which is replaced in
    the end. ``n_bytes`` is the room needed. On any error, and on an interrupt, nothing new is left and the old
    directory is as it was. Raises ``OutputError`` for a target that may not be written or replaced and for whatever
    the system refuses in the block.
    """
    place = target.resolve()
    check_directory(place, overwrite=overwrite, n_bytes=n_bytes)
    partial = place.with_name(f"{place.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            partial.mkdir()
            yield partial
            flush_directory(partial)
            publish(partial, place, overwrite)
        except OSError as error:  # of a write: readers name their own files
            raise refused(error, place) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_directory(target: Path, *, overwrite: bool, n_bytes: int) -> None:
    """Raise ``OutputError`` when ``target`` cannot become a new directory of ``n_bytes``; changes nothing."""
    place = target.resolve()
    try:
        found = sorted(place.iterdir()) if place.exists() else []
        if not place.parent.is_dir():
            raise OutputError(
                "the directory above the output does not exist", where=place.parent, fix="create it first"
            )
        free = shutil.disk_usage(place.parent).free
    except NotADirectoryError:
        raise OutputError(
            "the output is there already and is no directory", where=place, fix="give another name"
        ) from None
    except OSError as error:
        raise refused(error, place) from error
    foreign = [entry.name for entry in found if not _is_of_a_model(entry)]
    if found and not overwrite:
        raise _not_empty(place, [entry.name for entry in found])
    if foreign:
        raise OutputError(
            "the output directory holds files that are no part of a model, so it is not replaced",
            where=place,
            found=listed(foreign),
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


def _is_of_a_model(entry: Path) -> bool:
    if entry.is_dir():
        templates = entry.name == CHAT_TEMPLATES and not entry.is_symlink()
        return templates and all(each.suffix == ".jinja" and not each.is_dir() for each in entry.iterdir())
    return any(fnmatch(entry.name, known) for known in _REPLACEABLE)


def check_apart(places: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ``OutputError`` when one of ``places``, directories to be replaced, is or holds one of ``inputs``."""
    replaced = [place.resolve() for place in places]
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
        os.ftruncate(descriptor, size)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(descriptor)
            raise
    return descriptor


def flush_directory(directory: Path) -> None:
    """So that new names survive a power cut as well as the files do."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, place: Path, overwrite: bool) -> None:
    """Put ``partial`` into its place. Raises ``OutputError`` when that was filled in the meantime."""
    if overwrite and place.exists():
        old = place.with_name(f"{place.name}.{secrets.token_hex(4)}.old")
        place.rename(old)
        try:
            partial.rename(place)
        except BaseException:
            old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        try:
            # Onto an empty directory a rename succeeds, onto one that was filled in the meantime it does not.
            partial.rename(place)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _not_empty(place, sorted(entry.name for entry in place.iterdir())) from None
            raise
    flush_directory(place.parent)


def _not_empty(place: Path, entries: list[str]) -> OutputError:
    return OutputError(
        "the output directory exists already and is not empty",
        where=place,
        found=listed(entries),
        fix="give another name, or allow replacing it with --overwrite",
    )


def refused(error: OSError, place: Path) -> OutputError:
    """What a refusal of the operating system means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "the disk is full",
            where=place,
            found=error.strerror,
            fix="free some space, or write elsewhere; nothing was left behind",
        )
    return OutputError(
        "the output cannot be written",
        where=error.filename or place,
        found=error.strerror,
        fix="mend that, or give another name for the output",
    )
