"""``report.json``: a whole evaluation as JSON with a version and a schema, which reads back as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from bamba_quant.errors import join_names
from bamba_quant.evaluation.result import FIGURES, SCHEMA, Evaluation
from bamba_quant.printable import printable_json
from bamba_quant.report.records import ReportError, from_plain, json_schema

# Of a report read back: 100,000 tensors' worth.
_MOST_BYTES = 32 << 20


def to_json(evaluation: Evaluation) -> str:
    """UTF-8 JSON text; what UTF-8 cannot encode (in a file name, for example) or a terminal would act on is escaped."""
    text = json.dumps(dataclasses.asdict(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    return printable_json(text) + "\n"


def read_report(path: str | Path) -> Evaluation:
    """The evaluation in a ``report.json``. Raises ``ReportError`` for any other file, naming what differs."""
    path = Path(path)
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
    if found != SCHEMA or isinstance(found, bool):
        raise ReportError(
            "not a report of a version that can be read",
            where=path,
            found=f"schema {reprlib.repr(found)}",
            expected=f"schema {SCHEMA}",
            fix="give the report.json that bamba-quant evaluate wrote, and read it with the version that wrote it",
        )
    evaluation: Evaluation = from_plain(Evaluation, value, str(path))
    _check_figures(evaluation, path)
    return evaluation


def _check_figures(evaluation: Evaluation, path: Path) -> None:
    """Raise ``ReportError`` where what is shown of a candidate is missing, or what was measured has no meaning."""
    if not evaluation.candidates:
        raise ReportError("a report without candidates", where=path)
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
                raise ReportError(f"the {name} histogram of {label} is not one", where=path)
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
