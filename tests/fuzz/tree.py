"""The files of a case, as data: contents by name, and what a file system can have in place of a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class Fifo:
    """A named pipe that nobody writes to."""


@dataclass(frozen=True)
class Directory:
    """An empty directory."""


@dataclass(frozen=True)
class Link:
    """A symbolic link; a relative ``target`` may be the link itself."""

    target: str


@dataclass(frozen=True)
class Unreadable:
    """A file that its owner may not read (the superuser may)."""

    content: bytes


@dataclass(frozen=True)
class Sparse:
    """A file that begins with ``content`` and is ``size`` bytes long, most of them holes."""

    content: bytes
    size: int


@dataclass(frozen=True)
class Shrinks:
    """A file that is cut to ``length`` bytes at the ``after``-th call of a function of the package."""

    content: bytes
    length: int
    after: int


Entry = bytes | Fifo | Directory | Link | Unreadable | Sparse | Shrinks
Tree = Mapping[str, Entry]


def write_tree(tree: Tree, place: Path) -> None:
    """Make ``tree`` below ``place``, which exists. A name that cannot be made there is left out."""
    root = os.fspath(place)
    for name, entry in tree.items():
        path = f"{root}/{name}"
        if "/" in name:
            os.makedirs(path.rpartition("/")[0], exist_ok=True)  # noqa: PTH103 - a tenth of the time
        if isinstance(entry, bytes):
            _write(path, entry)
        elif isinstance(entry, Fifo):
            os.mkfifo(path)
        elif isinstance(entry, Directory):
            os.mkdir(path)  # noqa: PTH102
        elif isinstance(entry, Link):
            os.symlink(entry.target, path)  # noqa: PTH211
        elif isinstance(entry, Unreadable):
            _write(path, entry.content)
            os.chmod(path, 0)  # noqa: PTH101
        else:
            _write(path, entry.content)
            if isinstance(entry, Sparse):
                os.truncate(path, entry.size)


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def listing(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below ``place``, without following a link."""
    found: dict[str, tuple[int, int]] = {}
    left = [os.fspath(place)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    is_directory = entry.is_dir(follow_symlinks=False)
                    found[entry.path] = (0, 0) if is_directory else (status.st_size, status.st_mtime_ns)
                    if is_directory:
                        left.append(entry.path)
        except OSError:
            continue
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names that appeared, disappeared or whose contents changed between two listings, each with what it was."""
    return [
        *(f"new: {name}" for name in after if name not in before),
        *(f"gone: {name}" for name in before if name not in after),
        *(f"changed: {name}" for name in after if name in before and before[name] != after[name]),
    ]


@contextmanager
def shrinking(tree: Tree, place: Path, ours: Callable[[str], bool]) -> Iterator[None]:
    """Have the files that shrink do so; ``ours`` says which source files' calls are counted."""
    cuts = sorted(
        (entry.after, f"{place}/{name}", entry.length)
        for name, entry in tree.items()
        if isinstance(entry, Shrinks)
    )
    if not cuts:
        yield
        return
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event not in ("call", "c_call") or not ours(frame.f_code.co_filename):
            return
        calls += 1
        while cuts and calls >= cuts[0][0]:
            _, path, length = cuts.pop(0)
            os.truncate(path, length)

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
