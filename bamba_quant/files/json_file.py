"""JSON objects as files hold them, each key once and every string real text, or an error that names file and key."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bamba_quant.errors import BambaQuantError, CheckpointError, repr_short
from bamba_quant.files.reading import read_bytes

T = TypeVar("T")

_NAMES: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
# An empty list of three characters takes 64 bytes once parsed: JSON of this size stays below 1 GiB.
JSON_BYTES = 24 << 20
_MOST_ITEMS = 8_000_000  # in JSON larger than JSON_BYTES, which bounds the items of any other
_MOST_NESTED = 100
# Only an escape can bring a lone surrogate into text that was UTF-8.
_SURROGATE_ESCAPE = re.compile(r"(\\+)u[dD]([89a-fA-F])[0-9a-fA-F]{2}")


def read_json(file: Path, purpose: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object. Raises ``CheckpointError`` when the file is missing or is anything else; see ``parse_json``."""
    return parse_json(read_bytes(file, purpose, limit), file)


def parse_json(raw: bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``raw``.

    A key that is repeated is an error: readers differ in which value they take. So are lone surrogates, which no
    file can store, numbers beyond float64's range, and nesting that recursive code could not follow. Raises
    ``CheckpointError`` for these and for anything but an object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise CheckpointError(
                "a JSON object has the same key twice",
                where=where,
                found=repr_short(twice),
                expected="each key once",
                fix="keep the right one of the two",
            )
        return made

    items = sum(map(raw.count, (b"[", b"{", b","))) if len(raw) > JSON_BYTES else 0
    if items > _MOST_ITEMS:
        raise CheckpointError(
            "a JSON text has too many items",
            where=where,
            found=f"{items:,} brackets and commas",
            expected=f"at most {_MOST_ITEMS:,}",
        )
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_float=_finite)
    except RecursionError:
        raise _nested_too_deeply(where) from None
    except ValueError as error:
        raise CheckpointError("the text cannot be read as JSON", where=where, found=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            "the text is not a JSON object",
            where=where,
            found=type(value).__name__,
            expected="an object, { … }",
        )
    _check_nesting(value, where)
    if lone := _lone_surrogate(text):
        raise CheckpointError(
            "a JSON string has half of a surrogate pair",
            where=where,
            found=lone,
            expected="whole characters",
        )
    return value


def optional(
    values: Mapping[str, Any],
    key: str,
    kind: type[T],
    where: object,
    error: type[BambaQuantError] = CheckpointError,
) -> T | None:
    """``values[key]``, None where it is missing or null. Raises ``error`` when it is of another kind."""
    value = values.get(key)
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise error(f"{key} is not {_NAMES[kind]}", where=where, found=repr_short(value), expected=_NAMES[kind])


def required(
    values: Mapping[str, Any],
    key: str,
    kind: type[T],
    where: object,
    error: type[BambaQuantError] = CheckpointError,
) -> T:
    """``values[key]``. Raises ``error`` when it is missing, null or of another kind."""
    value = optional(values, key, kind, where, error)
    if value is None:
        raise error(f"{key} is missing", where=where, found=repr_short(values), expected=_NAMES[kind])
    return value


def object_list(
    values: Mapping[str, Any], key: str, where: object, error: type[BambaQuantError] = CheckpointError
) -> list[dict[str, Any]]:
    """The list of objects under ``key``, empty where it is missing or null. Raises ``error`` for anything else."""
    listed = optional(values, key, list, where, error) or []
    for entry in listed:
        if not isinstance(entry, dict):
            raise error(
                f"an entry of {key} is not an object",
                where=where,
                found=repr_short(entry),
                expected="an object",
            )
    return listed


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]}… is beyond the range of float64")
    return number


def _nested_too_deeply(where: object) -> CheckpointError:
    return CheckpointError(
        "a JSON text is nested too deeply", where=where, expected=f"at most {_MOST_NESTED} levels"
    )


def _check_nesting(value: Any, where: object) -> None:
    level = [value]
    for _ in range(_MOST_NESTED):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise _nested_too_deeply(where)


def _lone_surrogate(text: str) -> str | None:
    """The first escape in JSON text of half of a surrogate pair: read from the text, since a walk over what was
    parsed takes longer than parsing.
    """
    high: re.Match[str] | None = None  # waiting for its other half
    for found in _SURROGATE_ESCAPE.finditer(text):
        if len(found[1]) % 2 == 0:  # backslashes that are escaped themselves
            continue
        is_low = found[2] in "cdefCDEF"
        if high is not None and not (is_low and found.start() == high.end() and len(found[1]) == 1):
            return high[0]
        if high is None and is_low:
            return found[0]
        high = None if is_low else found
    return high and high[0]


_INDENTED_KEY = re.compile(r'\{\s*?\n([ \t]+)"')


def insert_key(raw: bytes, key: str, value: Any, where: object) -> bytes:
    """The text of the object in ``raw`` with ``key`` after its last entry, indented like it.

    Every other byte stays, so no reader and writer of JSON can change a value's spelling (transformers 5 writes
    infinity as an object). Raises ``CheckpointError`` when the text is not a JSON object or has the key already.
    """
    if key in parse_json(raw, where):
        raise CheckpointError(
            f"the configuration has {key} already",
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
