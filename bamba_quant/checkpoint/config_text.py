"""Adds a key to a JSON object's text and leaves every other byte as it was.

What else stands there, in whatever spelling (transformers 5 writes infinity as an object), no reader and writer of
JSON has a chance to change.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bamba_quant.errors import CheckpointError
from bamba_quant.files.json_file import parse_json

_INDENTED_KEY = re.compile(r'\{\s*?\n([ \t]+)"')


def insert_key(raw: bytes, key: str, value: Any, where: object) -> bytes:
    """The text of the object in ``raw`` with ``key`` behind its last entry, indented as that is.

    Raises ``CheckpointError`` when the text is no JSON object or has the key already.
    """
    if key in parse_json(raw, where):
        raise CheckpointError(
            f"{key} stands in the configuration already",
            where=where,
            fix="remove it where it is null, or give the checkpoint that was not quantized",
        )
    text = raw.decode("utf-8")
    end = text.rindex("}")
    before, after = text[:end], text[end:]
    body = before.rstrip()
    blank = before[len(body) :]
    match = _INDENTED_KEY.match(before.lstrip())
    comma = "" if body.endswith("{") else ","
    if match is None:
        return f"{body}{comma}{' ' if comma else ''}{json.dumps(key)}: {json.dumps(value)}{blank}{after}".encode()
    indent = match[1]
    lines = json.dumps({key: value}, indent=indent).splitlines()[1:-1]
    newline = "\r\n" if "\r\n" in before else "\n"
    return f"{body}{comma}{newline}{newline.join(lines)}{blank}{after}".encode()
