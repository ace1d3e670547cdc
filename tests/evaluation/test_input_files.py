"""Files are hashed as by hashlib, whatever group they are in; hashing that nobody waits for is cancelled."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

import pytest

from bamba_quant.evaluation import input_files as module
from bamba_quant.evaluation.input_files import FileHasher, HashingError, hash_files


def test_groups_that_share_a_file(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(7)]
    for number, file in enumerate(files):
        file.write_bytes(os.urandom(number * 2_500_000))
    with FileHasher([files[:5], files[4:], []]) as hashing:
        first, second, none = hashing.finish()
    expected = [
        (file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
    ]
    assert [tuple(vars(each).values()) for each in first] == expected[:5]
    assert [tuple(vars(each).values()) for each in second] == expected[4:]
    assert none == () and hash_files(files[:2]) == first[:2]


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(HashingError, match=r"(?s)cannot be read.*gone\.bin.*No such file"):
        hash_files([tmp_path / "gone.bin"])


def test_what_is_not_waited_for_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without an end: were it not given up, this would not return."""

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            began.set()
            return len(memoryview(buffer))  # type: ignore[arg-type]

    began = threading.Event()
    file = tmp_path / "endless.bin"
    file.write_bytes(b"")
    monkeypatch.setattr(module.Path, "open", lambda self, *args, **kwargs: Endless())
    with FileHasher([[file]]):
        assert began.wait(60)
