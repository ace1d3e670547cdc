"""The command line as the fuzzer calls it: what compiled code prints is seen as well."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import calls
from tests.fuzz.runner import WrongError


@pytest.mark.parametrize(
    ("text", "fails"), [(b"thread 'main' panicked at src/lib.rs:1", True), (b"a note", False)]
)
def test_panics_of_compiled_code_are_failures(
    text: bytes, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "main", lambda: os.write(2, text))
    before = os.fstat(2)
    if fails:
        with pytest.raises(WrongError, match="panicked"):
            calls.command("inspect", "x")
    else:
        calls.command("inspect", "x")
    assert os.path.samestat(before, os.fstat(2))
