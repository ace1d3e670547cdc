"""Frozen records to plain JSON values and back, and their JSON Schema, all by the records' own annotations."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from bamba_quant.errors import BambaQuantError, join_names

_SCALARS: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}

# What numbers of a report are between, in size: a percent of any is a number too.
_LEAST, _MOST, _MOST_BITS = 1e-300, 1e306, 64


class ReportError(BambaQuantError):
    """A file that is not a report, or of a version this program does not know."""


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """``value``, parsed JSON, as the annotated ``kind``. Raises ``ReportError`` naming the place that differs."""
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast(type, kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(from_plain(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: from_plain(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if not _is(kind, value):
        raise _wrong(where, value, "null" if kind is type(None) else _SCALARS[kind])
    return _plain(kind, value, where)


def json_schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of the annotated ``kind``; every record in it is added to ``definitions`` by its name."""
    if dataclasses.is_dataclass(kind):
        record = typing.cast(type, kind)
        if record.__name__ not in definitions:
            definitions[record.__name__] = {}
            hints = typing.get_type_hints(record)
            definitions[record.__name__] |= {
                "type": "object",
                "description": " ".join((record.__doc__ or "").split()),
                "properties": {name: json_schema(hint, definitions) for name, hint in hints.items()},
                "required": list(hints),
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{record.__name__}"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [json_schema(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": json_schema(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": json_schema(arguments[1], definitions)}
    return {"type": "null" if kind is type(None) else _SCALARS[kind]}


def _record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    hints = typing.get_type_hints(kind)
    if value.keys() != hints.keys():
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
        raise ReportError(
            "a report's record has other fields than this version writes",
            where=where,
            found="; ".join(
                f"{what} {join_names(names)}"
                for what, names in (("unknown", unknown), ("missing", missing))
                if names
            ),
            fix="read it with the version of bamba-quant that wrote it",
        )
    return kind(**{name: from_plain(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    scalars = [kind for kind in kinds if kind is type(None) or kind in _SCALARS]
    for kind in scalars:
        if _is(kind, value):
            return _plain(kind, value, where)
    others = [kind for kind in kinds if kind not in scalars]
    if not others:
        raise _wrong(where, value, " or ".join("null" if k is type(None) else _SCALARS[k] for k in scalars))
    return from_plain(others[0], value, where)


def _is(kind: Any, value: Any) -> bool:
    if kind is type(None):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _plain(kind: Any, value: Any, where: str) -> Any:
    """A scalar; of numbers those with which a report can go on to count."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _wrong(where, f"an integer of {value.bit_length():,} bits", f"one of {_MOST_BITS} at most")
    if kind is not float:
        return value
    number = float(value)
    if number and not _LEAST <= abs(number) <= _MOST:
        raise _wrong(where, number, f"0, or a number from {_LEAST:g} to {_MOST:g} in size")
    return number


def _wrong(where: str, value: Any, expected: str) -> ReportError:
    return ReportError(
        "a report holds a value of another kind", where=where, found=reprlib.repr(value), expected=expected
    )
