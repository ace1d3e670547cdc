"""``report.json``: a whole evaluation as JSON with a version and a schema, which reads back as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from bamba_quant.errors import BambaQuantError, join_names
from bamba_quant.evaluation.result import FIGURES, SCHEMA, Evaluation
from bamba_quant.printable import printable_json

# Of a report read back: 100,000 tensors' worth.
_MOST_BYTES = 32 << 20


def to_json(evaluation: Evaluation) -> str:
    """UTF-8 JSON text; what UTF-8 cannot encode (in a file name, for example) or a terminal would act on is escaped."""
    text = json.dumps(dataclasses.asdict(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    return printable_json(text) + "\n"


def read_report(path: str | Path) -> Evaluation:
    """The evaluation in a ``report.json``. Raises ``ReportError`` for any other file, naming what differs."""
    path = Path(path)
    evaluation: Evaluation = from_plain(Evaluation, report_object(path, (SCHEMA,)), str(path))
    _check_figures(evaluation, path)
    return evaluation


def report_object(path: Path, schemas: Collection[int]) -> dict[str, Any]:
    """The JSON object of a report of one of ``schemas``. Raises ``ReportError`` for any other file."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ReportError(
                "the report cannot be read",
                where=path,
                expected=f"a regular file of at most {_MOST_BYTES:,} bytes",
            )
        value = json.loads(
            path.read_text("utf-8"),
            parse_constant=_refuse,
            parse_float=_finite,
            object_pairs_hook=_once,
        )
    except OSError as error:
        raise ReportError("the report cannot be read", where=path, found=error.strerror) from error
    except RecursionError as error:
        raise ReportError("the report is nested too deeply", where=path) from error
    except ValueError as error:
        raise ReportError("the report is not JSON", where=path, found=str(error)) from error
    found = value.get("schema") if isinstance(value, dict) else None
    if found not in schemas or isinstance(found, bool):
        raise ReportError(
            "not a report of a version that can be read",
            where=path,
            found=f"schema {reprlib.repr(found)}",
            expected=f"schema {' or '.join(map(str, schemas))}",
            fix="give the report.json that bamba-quant evaluate wrote, and read it with the version that wrote it",
        )
    return typing.cast(dict[str, Any], value)


def _check_figures(evaluation: Evaluation, path: Path) -> None:
    """Raise ``ReportError`` where what is shown of a candidate is missing, or what was measured has no meaning."""
    if not evaluation.candidates:
        raise ReportError("the report has no candidates", where=path)
    floor = evaluation.noise_floor
    known = [("the noise floor", floor.figures.keys() - FIGURES.keys())] if floor else []
    for candidate in evaluation.candidates:
        label = candidate.model.label
        known += [
            (label, candidate.figures.keys() ^ FIGURES.keys()),
            (f"the gates of {label}", {gate.figure for gate in candidate.gates} - FIGURES.keys()),
        ]
        for name, histogram in (("kld", candidate.kld_histogram), ("delta_p", candidate.delta_p_histogram)):
            if len(histogram.edges) != len(histogram.counts) + 1 or list(histogram.edges) != sorted(
                histogram.edges
            ):
                raise ReportError(f"the {name} histogram of {label} is invalid", where=path)
    for place, strange in known:
        if strange:
            raise ReportError(
                "a report lacks figures that this version shows, or has others",
                where=f"{path}, {place}",
                found=join_names(sorted(strange)),
            )


def schema() -> dict[str, Any]:
    """The JSON Schema that ``report.schema.json`` in this package holds, from the records themselves."""
    definitions: dict[str, Any] = {}
    top = json_schema(Evaluation, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"bamba-quant accuracy report, version {SCHEMA}",
        **top,
        "$defs": {
            **definitions,
            "Evaluation": {
                **definitions["Evaluation"],
                "properties": {**definitions["Evaluation"]["properties"], "schema": {"const": SCHEMA}},
            },
        },
    }


def schema_text() -> str:
    """The schema as it is packaged."""
    return (files("bamba_quant.report") / "report.schema.json").read_text("utf-8")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is larger than any number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has the same key twice")
    return made


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
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if value.keys() - hints.keys() or needed - value.keys():  # older reports lack what now has a default
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(needed - value.keys())
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
    return kind(**{name: from_plain(hints[name], each, f"{where}.{name}") for name, each in value.items()})


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
        "a report has a value of another type", where=where, found=reprlib.repr(value), expected=expected
    )
