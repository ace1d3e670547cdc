"""``report.json``: a whole evaluation as JSON with a version and a schema, which reads back as it was."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from bamba_quant.evaluation.result import SCHEMA, Evaluation
from bamba_quant.printable import visible_json
from bamba_quant.report.records import ReportError, from_plain, json_schema


def to_json(evaluation: Evaluation) -> str:
    """UTF-8 JSON text; what UTF-8 cannot encode (in a file name, for example) or a terminal would act on is escaped."""
    text = json.dumps(dataclasses.asdict(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    return visible_json(text) + "\n"


def read_report(path: str | Path) -> Evaluation:
    """The evaluation in a ``report.json``. Raises ``ReportError`` for any other file, naming what differs."""
    path = Path(path)
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise ReportError("the report cannot be read", where=path, found=error.strerror) from error
    except ValueError as error:
        raise ReportError("the report is no JSON", where=path, found=str(error)) from error
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA or isinstance(found, bool):
        raise ReportError(
            "this is no report of a version that can be read",
            where=path,
            found=f"schema {found!r}",
            expected=f"schema {SCHEMA}",
            fix="give the report.json that bamba-quant evaluate wrote, and read it with the version that wrote it",
        )
    evaluation: Evaluation = from_plain(Evaluation, value, str(path))
    return evaluation


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
    raise ValueError(f"{constant} is no JSON number")
