"""Compiled kernels are cached on disk; a damaged cache costs time, never a run or a right result."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types

from bamba_quant.writers.atomic import atomic_files
from bamba_reference.runtime import compilation, kernel_cache
from bamba_reference.runtime.jit import compile_kernel

SIGNATURE = types.void(types.Array(types.float64, 1, "C"))


def adder(step: float) -> Callable[[Any], None]:
    """A kernel that adds ``step``: each call makes another function, of the same name and source."""

    def add(x: Any) -> None:
        for i in range(len(x)):
            x[i] += step

    return add


def added(step: float) -> tuple[float, bool]:
    """The compiled kernel's result for 1, and whether it was found in the cache."""
    code: Any = compile_kernel(adder(step), SIGNATURE, ())
    x = np.ones(3)
    code(x)
    return float(x[2]), bool(code.stats.cache_hits)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    kernel_cache._opened.cache_clear()
    kernel_cache._warn.cache_clear()


def files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def test_who_listens_is_told_of_compiling_and_of_its_time(place: Path) -> None:
    told: list[object] = []
    with compilation.listen(lambda: told.append("compiling"), told.append):
        added(1.0)
        added(1.0)
    added(1.0)
    assert [type(each) for each in told] == [str, float, float]


def test_kept_for_the_next_process_and_apart_from_one_another(place: Path) -> None:
    assert [added(step) for step in (1.0, 2.0)] == [(2.0, False), (3.0, False)]
    assert [path.suffix for path in files(place)] == [".nbc", ".nbc"]
    assert {path.parent.stat().st_mode & 0o777 for path in files(place)} == {0o700}
    assert [added(step) for step in (2.0, 1.0)] == [(3.0, True), (2.0, True)]


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flipped(raw: bytes) -> bytes:
    return raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "within the digest": lambda raw: raw[:20],
    "truncated": truncated,
    "a bit flipped": flipped,
    "garbage": lambda raw: os.urandom(len(raw)),
    "longer": lambda raw: raw + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew(damage: str, place: Path) -> None:
    added(1.0)
    (file,) = files(place)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    with pytest.warns(UserWarning, match=f"damaged in {place}"):
        assert added(1.0) == (2.0, False)
    assert added(1.0) == (2.0, True)
    assert files(place) == [file]


def test_the_code_of_another_kernel_and_content_that_is_none(place: Path) -> None:
    added(1.0)
    (one,) = files(place)
    added(2.0)
    (other,) = set(files(place)) - {one}
    other.write_bytes(one.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        assert added(2.0) == (3.0, False)
    raw = pickle.dumps((1, 2))
    one.write_bytes(hashlib.sha256(one.name.encode() + b"\0" + raw).digest() + raw)
    kernel_cache._warn.cache_clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert added(1.0) == (2.0, False)


def test_a_full_disk_is_the_caches_own_and_is_told_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with atomic_files([(tmp_path / "output", 1)], overwrite=False):
            assert [added(step) for step in (1.0, 2.0)] == [(2.0, False), (3.0, False)]
        monkeypatch.undo()
    (warning,) = told
    assert f"(No space left on device) in {place}" in str(warning.message)
    assert (tmp_path / "output").is_file()
    assert files(place) == []


def test_on_a_full_file_system(place: Path, tmp_path: Path) -> None:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.warns(UserWarning, match=rf"No space left on device\) in {place}"):
            assert added(1.0) == (2.0, False)
        assert files(place) == []
    finally:
        kernel_cache.os.close(kernel_cache._opened(next((place / "bamba-quant").iterdir())))  # type: ignore[arg-type]
        subprocess.run(["umount", str(place)], check=True)


def unsafe(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = files(place)[0].parent
    if kind == "another user's":
        monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: directory.stat().st_uid + 1)
    elif kind == "a link":
        directory.rename(place / "elsewhere")
        directory.symlink_to(place / "elsewhere")
    else:
        directory.chmod(0o770 if kind == "the group's" else 0o777)


@pytest.mark.parametrize("kind", ["another user's", "the group's", "everybody's", "a link"])
def test_nothing_is_unpickled_that_another_may_have_written(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added(1.0)
    kernel_cache._opened.cache_clear()
    (file,) = files(place)

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    raw = pickle.dumps(Evil())
    file.write_bytes(hashlib.sha256(file.name.encode() + b"\0" + raw).digest() + raw)
    unsafe(place, kind, monkeypatch)
    with pytest.warns(UserWarning, match=f"cannot be kept .* in {place}"):
        assert added(1.0) == (2.0, False)
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_not_a_directory(place: Path) -> None:
    place.touch()
    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR"):
        assert added(1.0) == (2.0, False)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR"):
        assert compile_kernel(adder(1.0), SIGNATURE, (Path(__file__).parent / "none",))


TOGETHER = """
from tests.reference.cpu_kernels.test_kernel_cache import added
import sys
sys.stdin.read()
assert [added(step)[0] for step in (1.0, 2.0, 3.0)] == [2.0, 3.0, 4.0]
"""


def test_processes_that_compile_at_the_same_time(place: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(place)}
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", TOGETHER], env=environment, stdin=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    for each in running:
        each.communicate(timeout=120)
    assert [each.returncode for each in running] == [0, 0]
    assert len(files(place)) == 3
    assert [added(step) for step in (1.0, 2.0, 3.0)] == [(2.0, True), (3.0, True), (4.0, True)]
