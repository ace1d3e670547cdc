"""A JSON file is read as one object with each key once, or an error names it; a key is added to its text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.errors import CheckpointError, TokenizerError
from bamba_quant.files.json_file import insert_key, object_list, optional, parse_json, read_json, required


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


ADDED = {"quant_method": "x", "ignore": ["re:.*\\.a$"], "empty": {}}

TEXTS = [
    '{"a": 1}',
    '{\n  "a": 1,\n  "time_step_limit": [\n    0.0,\n    {\n      "__float__": "Infinity"\n    }\n  ]\n}\n',
    '{\n\t"a": 1.0e-05\n}',
    '{\r\n    "a": [1, 2]\r\n}\r\n',
    "{}",
    "{\n}\n",
    '  {"a": Infinity, "b": "}"}  \n\n',
    '{"a": {"b": {}}}\n',
]


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_key_is_added(text: str) -> None:
    found = insert_key(text.encode(), "quantization_config", ADDED, "config.json").decode()
    parsed = json.loads(found)
    assert parsed.pop("quantization_config") == ADDED
    assert parsed == json.loads(text)
    assert list(json.loads(found))[-1] == "quantization_config"
    before = text[: text.rindex("}")].rstrip()
    assert found.startswith(before)
    after = text[text.rindex("}") :]
    assert found.endswith(after)
    added = found[len(before) : len(found) - len(after)]
    assert ("\n" in added) == ("\n" in text[: text.rindex("}")])


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.integers() | st.text(max_size=8) | st.none(), st.lists, max_leaves=8),
        max_size=5,
    ),
    st.sampled_from([None, 1, 2, 4, "\t"]),
    st.booleans(),
)
def test_a_key_is_added_to_any_object(value: dict[str, Any], indent: Any, ascii_only: bool) -> None:
    if "k" in value:
        return
    raw = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    value = json.loads(raw)
    assert json.loads(insert_key(raw, "k", ADDED, "x")) == value | {"k": ADDED}


def test_a_key_that_is_there() -> None:
    with pytest.raises(CheckpointError, match="already"):
        insert_key(b'{"k": null}', "k", 1, "config.json")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        insert_key(b"[]", "k", 1, "config.json")
