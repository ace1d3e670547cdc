"""What people wrote about a model, in its card, its generation settings or a metadata file, checked value by value."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import Keys

from bamba_quant.errors import CheckpointError, PlanError, join_names, repr_short
from bamba_quant.files.json_file import read_json
from bamba_quant.files.reading import lexists
from bamba_quant.metadata.model_card import read_front_matter

# The keys of a card that gguf-py's Metadata.apply_metadata_heuristic reads.
_ABOUT = (
    "name author version organization description finetune basename size_label url doi uuid repo_url".split()
)
_CARD_TEXTS = (*_ABOUT, *(f"model_{key}" for key in _ABOUT), "model_creator", "model_type")
_CARD_LISTS = ("tags", "pipeline_tag", "languages", "language")
_CARD_MODELS = ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
_CARD_LICENCES = ("license", "license_name", "license_link")

_MOST_CHARACTERS, _MOST_ENTRIES = 1 << 16, 10_000
Check = Callable[[str, Any, Path | None], Any]


def checked_text(key: str, value: Any, where: Path | None) -> str:
    """``value`` as text; numbers and dates have one obvious form. Raises ``PlanError`` for anything else."""
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, int | float | datetime.date) and not isinstance(value, bool) and finite:
        value = str(value)
    if not isinstance(value, str) or "\0" in value or not _is_storable(value):
        raise _invalid(key, value, where, "text")
    if len(value) > _MOST_CHARACTERS:
        raise _invalid(key, value, where, f"text of at most {_MOST_CHARACTERS:,} characters")
    return value


def _is_storable(value: str) -> bool:
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _texts(key: str, value: Any, where: Path | None) -> list[str] | None:
    """A list of texts; one alone is a list of one. YAML reads the language ``no`` as false."""
    entries = _entries(key, value, where)
    if key.endswith(("language", "languages")):
        entries = ["no" if entry is False else entry for entry in entries]
    return [checked_text(key, entry, where) for entry in entries] or None


def _entries(key: str, value: Any, where: Path | None) -> list[Any]:
    entries = value if isinstance(value, list) else [value]
    if len(entries) > _MOST_ENTRIES:
        raise _invalid(key, value, where, f"at most {_MOST_ENTRIES:,} entries")
    return entries


def _licence(key: str, value: Any, where: Path | None) -> str | None:
    return ",".join(_texts(key, value, where) or ()) or None


def _models(key: str, value: Any, where: Path | None) -> list[str | dict[str, str]] | None:
    """Models or data sets: names, or objects with details."""
    entries = _entries(key, value, where)
    found: list[str | dict[str, str]] = []
    for entry in entries:
        if not isinstance(entry, dict):
            found.append(checked_text(key, entry, where))
            continue
        parts = {
            part: checked_text(f"{key}.{part}", entry[part], where)
            for part in _ABOUT
            if entry.get(part) is not None
        }
        if not parts:
            raise _invalid(key, entry, where, "an object with some of " + ", ".join(_ABOUT))
        found.append(parts)
    return found or None


def _model_objects(key: str, value: Any, where: Path | None) -> list[dict[str, str]] | None:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _invalid(key, value, where, "a list of objects")
    for entry in value:
        unknown = sorted(entry.keys() - set(_ABOUT))
        if unknown:
            raise _invalid(f"{key}.{unknown[0]}", entry[unknown[0]], where, "keys among " + ", ".join(_ABOUT))
    return _models(key, value, where)  # type: ignore[return-value]


def _number(key: str, value: Any, where: Path | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise _invalid(key, value, where, "a finite number")
    return float(value)


def _integer(key: str, value: Any, where: Path | None) -> int:
    number = _number(key, value, where)
    if not number.is_integer() or abs(number) >= 2**31:
        raise _invalid(key, value, where, "a whole number of 32 bits")
    return int(number)


def _invalid(key: str, value: Any, where: Path | None, expected: str) -> PlanError:
    return PlanError(
        f"the value of {key} is not valid as GGUF metadata",
        where=where,
        found=ascii(repr_short(value)),
        expected=expected,
        fix="correct the value"
        + (
            ", or move the file out of the model's directory"
            if where is not None and where.suffix == ".md"
            else ""
        ),
    )


# Attributes of gguf-py's Metadata by the end of their key, with the check of their values.
_SAMPLING: dict[str, Check] = {
    "sequence": checked_text,
    "top_k": _integer,
    "top_p": _number,
    "min_p": _number,
    "xtc_probability": _number,
    "xtc_threshold": _number,
    "temp": _number,
    "penalty_last_n": _integer,
    "penalty_repeat": _number,
    "mirostat": _integer,
    "mirostat_tau": _number,
    "mirostat_eta": _number,
}
_OVERRIDES: dict[str, tuple[str, Check]] = {
    **{
        getattr(Keys.General, f"SAMPLING_{name.upper()}"): (f"sampling_{name}", check)
        for name, check in _SAMPLING.items()
    },
    **{
        getattr(Keys.General, name.upper()): (name, checked_text)
        for name in (
            "name author version organization finetune basename description quantized_by size_label license "
            "license_name license_link url doi uuid repo_url source_url source_doi source_uuid source_repo_url"
        ).split()
    },
    Keys.General.TAGS: ("tags", _texts),
    Keys.General.LANGUAGES: ("languages", _texts),
    "general.base_models": ("base_models", _model_objects),
    "general.datasets": ("datasets", _model_objects),
}


def read_card(file: Path) -> dict[str, Any]:
    """The front matter of a model card as far as a GGUF takes it over; empty without one.

    Raises ``PlanError`` for a card that is not UTF-8, for front matter that is not plain YAML and for values of
    another kind.
    """
    if not lexists(file):
        return {}
    try:
        card = read_front_matter(file)
    except CheckpointError as error:
        raise PlanError(
            "the model card cannot be read as UTF-8 text",
            where=file,
            found=f"{error.what}; {error.found}",
            fix="save it as UTF-8, or move it away",
        ) from error
    checks: dict[str, Check] = {
        **dict.fromkeys(_CARD_TEXTS, checked_text),
        **dict.fromkeys(_CARD_LISTS, _texts),
        **dict.fromkeys(_CARD_MODELS, _models),
        **dict.fromkeys(_CARD_LICENCES, _licence),
    }
    checked = {key: check(key, card[key], file) for key, check in checks.items() if card.get(key) is not None}
    return {key: value for key, value in checked.items() if value is not None}


def read_sampling(file: Path) -> dict[str, Any]:
    """What generation_config.json recommends for sampling, by attribute of gguf-py's Metadata."""
    if not lexists(file):
        return {}
    values = read_json(file, "the model's settings for generation")
    return {
        f"sampling_{name}": check(key, values[key], file)
        for name, check in _SAMPLING.items()
        if values.get(key := "temperature" if name == "temp" else name) is not None
    }


def read_overrides(file: Path | None) -> dict[str, Any]:
    """A metadata file's values by attribute of gguf-py's Metadata. Raises ``PlanError`` for keys without effect."""
    if file is None:
        return {}
    try:
        values: Mapping[str, Any] = read_json(file, "an object of general.* keys")
    except CheckpointError as error:
        raise PlanError(
            "the metadata file cannot be read as a JSON object",
            where=error.where,
            found=f"{error.what}; {error.found}",
            expected="an object with keys among " + ", ".join(sorted(_OVERRIDES)),
        ) from error
    unknown = sorted(values.keys() - _OVERRIDES.keys())
    if unknown:
        raise PlanError(
            "the metadata file has unknown keys",
            where=file,
            found=join_names(unknown),
            expected="keys among " + ", ".join(sorted(_OVERRIDES)),
        )
    return {
        _OVERRIDES[key][0]: None if value is None else _OVERRIDES[key][1](key, value, file)
        for key, value in values.items()
    }
