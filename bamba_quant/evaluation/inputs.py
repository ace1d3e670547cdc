"""All files that an evaluation may read, so that no output of it replaces one."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bamba_quant.checkpoint.gguf_file import split_stem

REPORTS = ("report.json", "report.md", "report.html")


def input_files(paths: Iterable[Path | None]) -> list[Path]:
    """The files among ``paths``, all shards of split GGUF files, and the files in directories and in theirs.

    Reports in a directory are not read, so a later evaluation may replace them.
    """
    found: list[Path] = []
    for path in paths:
        if path is not None:
            with suppress(OSError):  # what cannot be listed cannot be evaluated either, which says why
                found += _below(path)
    return found


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for pattern in ("*", "*/*"):
            yield from (file for file in path.glob(pattern) if file.is_file() and file.name not in REPORTS)
    elif path.is_file():
        yield path
        if path.suffix == ".gguf":
            stem = split_stem(path)
            yield from stem.parent.glob(f"{glob.escape(stem.name)}-*-of-*.gguf")
