"""What is finished of a release: a record for each task, with the settings that decided it and the checksums it made.

Records lie in the folder ``.release`` of the release. A task is done when its record has the settings of now and its
files are as they were. Records appear whole, after what they tell of, so a run that is killed loses one task at most,
and of a directory or of tuning only what its own journal does not have. A task is locked while a process works on it.
A note that it was begun, NAME.begun, stays: what lies at a task's output without one is not the release's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamba_quant.errors import OutputError, join_names
from bamba_quant.files.json_file import read_json
from bamba_quant.files.reading import lexists
from bamba_quant.releases.preset import ReleaseError
from bamba_quant.releases.tasks import Release, Task
from bamba_quant.writers.atomic import output_error, write_text

STATE = ".release"
_IN_WORDS = {"needs": "the files that it is made from", "reading": "options for reading the model"}


@dataclass(frozen=True)
class MadeFile:
    """``path`` below the release's directory, with ``mtime_ns`` when its ``sha256`` was computed."""

    path: str
    n_bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Record:
    """A finished task: ``settings`` as ``settings_now`` gives them, its files, and the seconds it took."""

    settings: Mapping[str, Any]
    files: tuple[MadeFile, ...]
    seconds: float


def settings_now(release: Release, task: Task) -> dict[str, Any]:
    """What decides a task's output, as JSON gives it back: its own settings, and what it needs by checksum."""
    needs = {name: _checksums(read_record(release, name)) for name in task.needs}
    found: dict[str, Any] = json.loads(json.dumps({**release.settings(task), "needs": needs}))
    return found


def is_done(release: Release, task: Task, *, overwrite: bool) -> bool:
    """Whether a task need not run: its record has the settings of now, and its files are as they were.

    A task whose files are gone runs again. Raises ``ReleaseError`` for other settings and for files that were changed,
    unless ``overwrite``, with which the task runs again.
    """
    record = read_record(release, task.name)
    if record is None:
        return False
    now = settings_now(release, task)
    if changed := [key for key in now if now[key] != record.settings.get(key)]:
        if overwrite:
            return False
        raise ReleaseError(
            f"{task.name} of this release was made with other settings",
            where=_record_file(release, task.name),
            found="different now: " + join_names([_IN_WORDS.get(key, key) for key in changed]),
            fix="give the settings it was made with, another directory, or --overwrite to make it again",
        )
    for made in record.files:
        file = release.directory / made.path
        if not file.is_file():
            return False
        state = file.stat()
        same = (state.st_size, state.st_mtime_ns) == (made.n_bytes, made.mtime_ns)
        if not same and made_file(release, file).sha256 != made.sha256:
            if overwrite:
                return False
            raise ReleaseError(
                "a file of the release was changed since it was made",
                where=file,
                fix="put it back, or give --overwrite to make it again",
            )
    return True


def read_record(release: Release, name: str) -> Record | None:
    """The record of the task ``name``, or None. Raises ``ReleaseError`` for one that is damaged."""
    file = _record_file(release, name)
    if not file.exists():
        return None
    found = read_json(file, "the record of a task of a release")
    try:
        files = tuple(MadeFile(**each) for each in found["files"])
        settings = found["settings"]
        kinds = [(type(made.n_bytes), type(made.mtime_ns)) for made in files]
        texts = [text for made in files for text in (made.path, made.sha256)]
        if not isinstance(settings, dict) or set(kinds) - {(int, int)} or {*map(type, texts)} - {str}:
            raise TypeError("a value of another kind")
        return Record(settings, files, float(found["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            "the record of a task is damaged",
            where=file,
            found=str(error),
            expected="settings, files and seconds, as a release writes them",
            fix="remove it; the task runs again",
        ) from None


def begin(release: Release, task: Task) -> None:
    """Note, before a task makes anything, that what lies at its output from now on is the release's."""
    write_text(_begun_file(release, task.name), "", overwrite=True)


def is_own(release: Release, task: Task) -> bool:
    """Whether the release made, or began to make, what lies at the output of ``task``."""
    return _begun_file(release, task.name).exists() or _record_file(release, task.name).exists()


def check_not_foreign(release: Release, task: Task) -> None:
    """Raise ``OutputError`` where something that the release did not make lies at the output of ``task``."""
    output = release.output(task)
    split = f"{output.stem}-?????-of-?????.gguf"
    found = [output, *sorted(output.parent.glob(split))] if task.kind == "gguf" else [output]
    if not is_own(release, task):
        refuse_foreign(file for file in found if not is_empty_directory(file))


def refuse_foreign(files: Iterable[Path]) -> None:
    """Raise ``OutputError`` for the first of ``files``, none of which the release made, that exists."""
    for file in files:
        if lexists(file):
            raise OutputError(
                "the release would replace what it did not make",
                where=file,
                found="no record of it, and no note that it was begun, in " + STATE,
                fix="move it away, give another directory, or give --overwrite to replace it",
            )


def is_empty_directory(file: Path) -> bool:
    return file.is_dir() and not any(file.iterdir())


def finished_record(release: Release, name: str) -> Record:
    """The record of a task that is done. Raises ``ReleaseError`` where there is none."""
    if (record := read_record(release, name)) is None:
        raise ReleaseError(
            "the release is not finished",
            where=release.directory,
            found=f"no record of {name}",
            fix="run the release again; it makes what is missing",
        )
    return record


def model_path(release: Release, task: Task) -> Path:
    """The path by which a model that was made is opened: of a split file its first part."""
    if task.kind == "directory":
        return release.output(task)
    return release.directory / min(made.path for made in finished_record(release, task.name).files)


def remove_replaced(release: Release, old: Record | None, files: Sequence[Path]) -> None:
    """Remove what the replaced record ``old`` lists and ``files``, which were made now, do not have."""
    for made in old.files if old else ():
        file = release.directory / made.path
        if file not in files and ".." not in file.parts and file.is_relative_to(release.directory):
            file.unlink(missing_ok=True)


def write_record(
    release: Release, task: Task, settings: Mapping[str, Any], files: Sequence[Path], seconds: float
) -> None:
    """Record that ``task`` made ``files``, which are hashed, in so many ``seconds``."""
    made = [vars(made_file(release, file)) for file in files]
    text = json.dumps({"settings": settings, "files": made, "seconds": round(seconds, 3)}, indent=1)
    write_text(_record_file(release, task.name), text + "\n", overwrite=True)


def made_file(release: Release, file: Path) -> MadeFile:
    """The record of a file below the release's directory."""
    with file.open("rb") as stream:
        state, digest = os.fstat(stream.fileno()), hashlib.file_digest(stream, "sha256").hexdigest()
    return MadeFile(file.relative_to(release.directory).as_posix(), state.st_size, digest, state.st_mtime_ns)


@contextmanager
def locked(release: Release, name: str, note: Callable[[str], None] = lambda note: None) -> Iterator[None]:
    """While the block runs, no other process works on the task ``name``; waits for one that does, with a ``note``."""
    file = release.directory / STATE / f"{name}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise output_error(error, file) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"{name}: another process works on it; waiting for it to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _checksums(record: Record | None) -> dict[str, str]:
    return {made.path: made.sha256 for made in record.files} if record else {}


def _begun_file(release: Release, name: str) -> Path:
    return release.directory / STATE / f"{name}.begun"


def _record_file(release: Release, name: str) -> Path:
    return release.directory / STATE / f"{name}.json"
