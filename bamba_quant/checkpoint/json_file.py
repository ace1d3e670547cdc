"""JSON objects as files hold them, each key once and every string real text, or an error that names file and key."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bamba_quant.errors import BambaQuantError, CheckpointError

T = TypeVar("T")

_NAMES: dict[type, str] = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
# Only an escape can bring a lone surrogate into text that was UTF-8.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(file: Path, purpose: str) -> dict[str, Any]:
    """A JSON object. Raises ``CheckpointError`` when the file is missing or is anything else; see ``parse_json``."""
    return parse_json(read_bytes(file, purpose), file)


def read_bytes(file: Path, purpose: str) -> bytes:
    """A small file. Raises ``CheckpointError`` saying its ``purpose`` when it is missing."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing", where=file.parent, expected=purpose) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read", where=file, found=str(error)) from error


def read_text(file: Path, purpose: str) -> str:
    """A small file of UTF-8 text. Raises ``CheckpointError`` for any other."""
    try:
        return read_bytes(file, purpose).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file.name} is no UTF-8 text", where=file, found=str(error), expected="UTF-8"
        ) from error


def parse_json(raw: bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``raw``.

    A key that stands twice is refused: readers differ in which value they take. So are lone surrogates, which
    no file can store. Raises ``CheckpointError`` for these and for anything but an object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(
                "a JSON object has the same key twice",
                where=where,
                found=ascii(twice),
                expected="each key once",
                fix="leave the right one of the two",
            )
        return made

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise CheckpointError("a JSON text is nested too deeply to be read", where=where) from None
    except ValueError as error:
        raise CheckpointError("the text cannot be read as JSON", where=where, found=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            "the text is no JSON object", where=where, found=type(value).__name__, expected="an object, { … }"
        )
    if _SURROGATE_ESCAPE.search(text):
        _refuse_surrogates(value, where)
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
    raise error(f"{key} is not {_NAMES[kind]}", where=where, found=reprlib.repr(value), expected=_NAMES[kind])


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
        raise error(f"{key} is missing", where=where, found=reprlib.repr(values), expected=_NAMES[kind])
    return value


def objects(
    values: Mapping[str, Any], key: str, where: object, error: type[BambaQuantError] = CheckpointError
) -> list[dict[str, Any]]:
    """The list of objects under ``key``, empty where it is missing or null. Raises ``error`` for anything else."""
    listed = optional(values, key, list, where, error) or []
    for entry in listed:
        if not isinstance(entry, dict):
            raise error(
                f"an entry of {key} is no object",
                where=where,
                found=reprlib.repr(entry),
                expected="an object",
            )
    return listed


def _refuse_surrogates(value: Any, where: object) -> None:
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            left += node.keys()
            left += node.values()
        elif isinstance(node, list):
            left += node
        elif isinstance(node, str) and any("\ud800" <= letter <= "\udfff" for letter in node):
            raise CheckpointError(
                "a JSON string is no text: it holds half of a surrogate pair",
                where=where,
                found=ascii(node),
                expected="whole characters",
            )
