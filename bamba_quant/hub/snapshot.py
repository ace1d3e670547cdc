"""Snapshots in huggingface_hub's cache, and directories that stand for one without its weights."""

from __future__ import annotations

import atexit
import glob
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bamba_quant import __version__
from bamba_quant.errors import CheckpointError
from bamba_quant.files.reading import REMOTE, SMALL_BYTES, RemoteFile, lexists, read_bytes
from bamba_quant.hub.choice import Choice, choose
from bamba_quant.hub.failures import hub_errors
from bamba_quant.hub.reference import VIEW, Reference

_WHO: dict[str, Any] = {"library_name": "bamba-quant", "library_version": __version__}
# huggingface_hub keeps what arrived before a connection broke in whole chunks of 10 MB: connections that break more
# often would never get any further.
_CHUNK_BYTES = 1 << 18
_HEADER_BYTES = 1 << 20  # that are read at once: most headers of safetensors
_SILENT_BYTES = 64 << 20  # that are fetched without a bar
_PICKLE_BYTES = 1 << 16  # of archives, which have a header for each tensor


@dataclass(frozen=True)
class _Repository:
    """``files`` are bytes by name; ``revision`` is huggingface_hub's, which knows the commit."""

    reference: Reference
    revision: Any
    files: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.reference.repository

    @property
    def commit(self) -> str:
        return str(self.revision.resolved)

    def download(self, names: Sequence[str]) -> Path:
        """The snapshot's directory, with these files. Raises ``CheckpointError`` where the disk cannot hold them."""
        from huggingface_hub import constants, snapshot_download

        missing = sum(self.files[name] for name in names if self.cached(name) is None)
        _check_space(missing)
        constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
        patterns = [glob.escape(name) for name in names]
        with _bars(missing > _SILENT_BYTES):
            found = snapshot_download(self.name, revision=self.revision, allow_patterns=patterns, **_WHO)
        return Path(found)

    def cached(self, name: str) -> Path | None:
        """The file in the cache, None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def choose(self) -> Choice:
        def read(index: str) -> bytes:
            return read_bytes(self.download([index]) / index, "the index of the shards", SMALL_BYTES)

        return choose(self.reference, self.files, read)


def fetched(reference: Reference) -> Path:
    """The model in its snapshot, once all it needs is there. Raises ``CheckpointError``."""
    with hub_errors(reference):
        repository = _open(reference)
        chosen = repository.choose()
        return repository.download((*chosen.small, *chosen.weights)) / chosen.path


def view(reference: Reference) -> Path:
    """The model in a directory like its snapshot, which this process removes: weights are ``reading.RemoteFile``.

    Weights that the cache has are links to it. Raises ``CheckpointError``.
    """
    with hub_errors(reference):
        repository = _open(reference)
        place = _views() / reference.key / "snapshots" / repository.commit
        chosen = repository.choose()
        _fill(place, repository, chosen)
        return place / chosen.path


def _open(reference: Reference) -> _Repository:
    from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download

    api = HfApi(**_WHO)
    revision = api.resolve_revision(reference.repository, revision=reference.revision)
    at: dict[str, Any] = {"repo_id": reference.repository, "revision": revision.resolved}
    try:
        files = {file.path: file.size for file in get_cached_repo_tree(**at)}
    except errors.CachedRepoTreeNotFoundError:
        if constants.HF_HUB_OFFLINE:  # what another program fetched
            snapshot = Path(snapshot_download(**at, local_files_only=True))
            found = [Path(folder, name) for folder, _, names in os.walk(snapshot) for name in names]
            files = {str(file.relative_to(snapshot)): file.stat().st_size for file in found}
        else:
            tree = api.list_repo_tree(**at, recursive=True)
            files = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    # Names become paths in this machine's directories.
    safe = {name: size for name, size in files.items() if not {"", "..", "."} & set(name.split("/"))}
    return _Repository(reference, revision, safe)


@cache
def _views() -> Path:
    """A directory that is removed when this process ends."""
    made = Path(tempfile.mkdtemp(prefix=VIEW))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _fill(place: Path, repository: _Repository, chosen: Choice) -> None:
    """Make the directory that stands for a snapshot; names on the Hub follow from its path, as from the cache's.

    Another model of the same repository may have filled a part of it.
    """
    (place / chosen.path).parent.mkdir(parents=True, exist_ok=True)
    small = [*chosen.small, *(name for name in chosen.weights if name.endswith(".index.json"))]
    small = [name for name in small if not lexists(place / name)]
    source = repository.download(small) if small else place
    for name in (*small, *chosen.weights):
        file = place / name
        if lexists(file):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if name in small:
            shutil.copyfile(source / name, file)
        elif cached := repository.cached(name):
            file.symlink_to(cached.resolve())
        else:
            file.touch()
            REMOTE[file] = _remote(repository, name)


def _remote(repository: _Repository, name: str) -> RemoteFile:
    commit = repository.commit

    def fetch(directory: Path | None) -> Path:
        from huggingface_hub import constants, hf_hub_download

        with hub_errors(repository.reference, streaming=directory is not None):
            constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
            with _bars(directory is None):  # else a bar of this program is on the screen
                found = hf_hub_download(repository.name, name, revision=commit, local_dir=directory, **_WHO)
            return Path(found)

    def open_ranges() -> io.RawIOBase:
        return _Ranges(repository.reference, name, commit)

    address = f"hf://{repository.name}@{commit}/{name}"
    return RemoteFile(address, repository.files[name], open_ranges, fetch)


class _Ranges(io.RawIOBase):
    """A file of the Hub, of which only the ranges are fetched that are read."""

    def __init__(self, reference: Reference, name: str, commit: str) -> None:
        self._reference = reference
        with hub_errors(reference):
            self._file = _opened(reference.repository, name, commit)
            self._file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any, /) -> int:
        with hub_errors(self._reference):
            found: bytes = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Inside the block huggingface_hub prints its progress only if that is ``shown`` or the user asks for it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    with (
        nullcontext() if shown or constants.HF_HUB_DISABLE_PROGRESS_BARS is False else disable_progress_bars()
    ):
        yield


@cache
def _opened(repository: str, name: str, commit: str) -> Any:
    """An open file of the Hub. It keeps what was read last: plans of one model read its headers again and again."""
    from huggingface_hub import HfFileSystem

    block = _PICKLE_BYTES if name.endswith(".bin") else _HEADER_BYTES
    return HfFileSystem().open(f"{repository}/{name}", revision=commit, block_size=block)


def _check_space(n_bytes: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise CheckpointError(
            "the disk of the Hub's cache has too little space",
            where=constants.HF_HUB_CACHE,
            found=f"{free:,} bytes free",
            expected=f"{n_bytes:,} bytes",
            fix="free some space, set HF_HOME to a directory on another disk, or convert with --stream-from-hub",
        )
