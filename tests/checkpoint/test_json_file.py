"""A JSON file is read as one object with each key once, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.errors import CheckpointError, TokenizerError
from bamba_quant.files.json_file import object_list, optional, parse_json, read_json, required


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"\xff\xfe{}", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "JSON"),
        (b"[" * 100_000, "deeply"),
        (b'{"a": ' * 100_000, "deeply"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"twice[\s\S]*'b'"),
        (b'{"a": ["\\ud800"]}', r"surrogate[\s\S]*ud800"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_refused(raw: bytes, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=complaint) as error:
        read_json(file, "a test")
    assert str(file) in str(error.value)


def test_missing_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"y\.json is missing[\s\S]*the purpose"):
        read_json(tmp_path / "y.json", "the purpose")
    (tmp_path / "y.json").mkdir()
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        read_json(tmp_path / "y.json", "the purpose")


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json", "a test") == {"a": "\U0001f600"}


def test_kinds() -> None:
    values = {"n": 1, "yes": True, "text": "x", "null": None, "list": [{}, 3]}
    assert optional(values, "n", int, "here") == 1
    assert optional(values, "null", int, "here") is optional(values, "absent", str, "here") is None
    with pytest.raises(CheckpointError, match=r"yes is not a whole number[\s\S]*here[\s\S]*True"):
        optional(values, "yes", int, "here")
    with pytest.raises(TokenizerError, match="null is missing"):
        required(values, "null", str, "here", TokenizerError)
    with pytest.raises(CheckpointError, match="entry of list"):
        object_list(values, "list", "here")


@given(
    st.lists(
        st.sampled_from([r"\\", r"\ud83d", r"\ude00", r"\uDBFF", "ud83d", r"\n", "a", "\ud7ff"]), max_size=6
    )
)
def test_a_lone_surrogate_is_found_wherever_it_is_escaped(parts: list[str]) -> None:
    text = '{"a": "' + "".join(parts) + '"}'
    lone = any("\ud800" <= letter <= "\udfff" for letter in json.loads(text)["a"])
    if lone:
        with pytest.raises(CheckpointError, match="surrogate pair"):
            parse_json(text.encode(), "here")
    else:
        assert parse_json(text.encode(), "here") == json.loads(text)
