"""A key goes into a configuration's text and not one other byte changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.errors import CheckpointError
from bamba_quant.files.json_file import insert_key

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


@given(st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.none(), st.lists)),
       st.sampled_from([None, 1, 2, 4, "\t"]), st.booleans())  # fmt: skip
def test_any_object(value: dict[str, Any], indent: Any, ascii_only: bool) -> None:
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
