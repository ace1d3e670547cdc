"""Errors of Triton's cache name the cache and its directory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bamba_reference.kernels import launch  # noqa: F401 - has Triton use the manager
from bamba_reference.torch.backend import BackendError
from tests.support.kernels import needs_triton

needs_triton()

from triton import knobs  # noqa: E402
from triton.runtime import cache  # noqa: E402


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield tmp_path / "cache"


def test_what_is_put_is_found(place: Path) -> None:
    manager = cache.get_cache_manager("ab" * 32)
    file = manager.put(b"code", "x.cubin")
    manager.put_group("x", {"x.cubin": file})
    assert manager.get_group("x") == {"x.cubin": file}
    assert Path(file).read_bytes() == b"code" and Path(file).is_relative_to(place)


def test_a_directory_that_cannot_be_made(place: Path) -> None:
    place.touch()
    with pytest.raises(BackendError, match=rf"its cache(.|\n)*where: {place}\n(.|\n)*TRITON_CACHE_DIR"):
        cache.get_cache_manager("ab" * 32)


def test_a_full_disk_and_a_damaged_index(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = cache.get_cache_manager("ab" * 32)
    Path(manager.put("{", "__grp__x")).write_text("{")
    with pytest.raises(BackendError, match="its cache"):
        manager.get_group("x")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BackendError, match="No space left"):
        manager.put(b"code", "x.cubin")
