"""A release as data: what it is made of, and its tasks, each with what it needs and what it makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bamba_quant import __version__
from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.files.names import CHAT_TEMPLATES
from bamba_quant.hub.choice import SMALL
from bamba_quant.metadata.model_name import name_of
from bamba_quant.releases.names import GGUF, check_names, gguf_name, imatrix_name, repositories
from bamba_quant.releases.preset import Preset

IMATRIX, EVALUATE = "imatrix", "evaluate"
REPORT = "report"
PICTURE, CHECKSUMS = "size-divergence.svg", "SHA256SUMS"  # in each folder, beside the card


@dataclass(frozen=True)
class Task:
    """Makes one file, one directory or the report; ``needs`` are names of tasks that come before."""

    name: str
    kind: Literal["imatrix", "gguf", "directory", "evaluate"]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Release:
    """All that decides a release, and where it is made; every process that works on it has the same.

    ``text`` is what files are evaluated on, ``calibrate`` what the importance matrix and tuned rounding learn from.
    ``device`` and ``threads`` decide no bytes of a file.
    """

    model: Path
    directory: Path
    preset: Preset
    name: str
    text: Path
    calibrate: tuple[Path, ...] = ()
    device: str = "cpu"
    threads: int | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In an order in which each finds what it needs."""
        preset = self.preset
        first = (Task(IMATRIX, "imatrix"),) if preset.imatrix_chunks else ()
        needs = tuple(each.name for each in first)
        made = (
            *(Task(name, "gguf", needs) for name in preset.types),
            *(Task(name, "directory", needs) for name in preset.schemes),
        )
        return (*first, *made, Task(EVALUATE, "evaluate", tuple(each.name for each in made)))

    @cached_property
    def folders(self) -> Mapping[str, str]:
        """Folders of ``directory``, one a repository, by scheme and ``GGUF``. Raises ``ReleaseError`` for names."""
        preset = self.preset
        check_names(self.name, [gguf_name(self.name, each) for each in preset.types], preset.schemes)
        return repositories(self.name, preset.schemes, preset.types)

    def output(self, task: Task) -> Path:
        """The file or directory that a task makes."""
        if task.kind == "evaluate":
            return self.directory / REPORT
        if task.kind == "directory":
            return self.directory / self.folders[task.name]
        folder = self.directory / self.folders.get(GGUF, "")
        name = imatrix_name(self.name) if task.kind == "imatrix" else gguf_name(self.name, task.name)
        return folder / name

    def settings(self, task: Task) -> dict[str, Any]:
        """What decides the bytes of a task's output, except what other tasks made; plain values for JSON."""
        preset, plain = self.preset, self.preset.plain()
        found: dict[str, Any] = {
            "version": __version__,
            "model": self._model,
            "output": self.output(task).name,
        }
        found["reading"] = repr(self.reading)
        tuned = task.name in preset.tune
        if task.kind == "imatrix" or tuned:
            found["calibration text"] = [_sha256(each) for each in self.calibrate]
        if task.kind == "imatrix":
            return found | {"imatrix_chunks": preset.imatrix_chunks}
        if task.kind == "evaluate":
            return (
                found | {key: plain[key] for key in ("ctx", "chunks", "gates")} | {"text": _sha256(self.text)}
            )
        found |= {"type": task.name, "tuned": dict(preset.tune_options) if tuned else None}
        return found | ({"split_bytes": preset.split_bytes} if task.kind == "gguf" else {})

    @cached_property
    def _model(self) -> dict[str, Any]:
        """Weights by size and by the commit or, where none is known, by time; small files by checksum."""
        directory = self.model if self.model.is_dir() else self.model.parent
        commit = name_of(directory).commit
        states = {file.name: file.stat() for file in open_checkpoint(self.model, reading=self.reading).files}
        found: dict[str, Any] = {"commit": commit}
        for name, state in sorted(states.items()):
            found[name] = [state.st_size] if commit else [state.st_size, state.st_mtime_ns]
        if self.model.is_dir():
            for file in sorted((*directory.glob("*"), *directory.glob(f"{CHAT_TEMPLATES}/*"))):
                if file.is_file() and any(fnmatch(file.name, pattern) for pattern in SMALL):
                    found[file.relative_to(directory).as_posix()] = _sha256(file)
        return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
