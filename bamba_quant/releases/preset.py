"""Presets: which files a release has, how they are made and measured, and what they may lose; TOML, read strictly."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bamba_quant.calibration.tune_options import TuneOptions
from bamba_quant.codecs import SafetensorsCodec, codec_named
from bamba_quant.errors import BambaQuantError, PlanError, did_you_mean, join_names
from bamba_quant.evaluation.gates import Limit, gate_sections
from bamba_quant.files.toml_file import read_toml
from bamba_quant.recipes import recipe_named

_BUILTIN = Path(__file__).with_name("presets.toml")
# What decides where and until when tuning runs, not what comes of it.
_NOT_TUNABLE = {
    "device", "graph", "max_memory", "max_minutes", "micro_batch", "recompute", "resume", "state", "train",
}  # fmt: skip
# What TOML gives for a field of TuneOptions, by its annotation.
_TUNE_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,),
}  # fmt: skip
_NAMES_OF_KINDS = {int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class Preset:
    """``types`` are GGUF recipes, ``schemes`` those of safetensors directories, ``tune`` those of both to be tuned.

    ``tune_options`` are fields of ``TuneOptions``. The importance matrix is measured on ``imatrix_chunks`` chunks of
    512 tokens at most; 0 means none. ``chunks`` chunks of ``ctx`` tokens are evaluated at most. A GGUF of more than
    ``split_bytes`` bytes is split. ``gates`` are limits by section, as in a gates file.
    """

    name: str
    about: str = ""
    types: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    tune: tuple[str, ...] = ()
    tune_options: Mapping[str, Any] = field(default_factory=dict)
    imatrix_chunks: int = 100
    ctx: int = 512
    chunks: int = 40
    split_bytes: int = 45 * 10**9
    gates: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Everything but the name and what it is about, as JSON holds it."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "about")}


def preset_names() -> tuple[str, ...]:
    """The built-in presets."""
    return tuple(tomllib.loads(_BUILTIN.read_text("utf-8")))


def read_preset(name: str) -> Preset:
    """The built-in preset called ``name``, or the one in a file whose name ends in .toml.

    Raises ``PlanError`` for another name, unknown keys, types and schemes, and values of another kind, and
    ``GateError`` for gates.
    """
    if name.lower().endswith(".toml"):
        return _preset(Path(name).stem, read_toml(Path(name), "preset", PlanError), name)
    known = tomllib.loads(_BUILTIN.read_text("utf-8"))
    if name not in known:
        raise PlanError(
            f"unknown preset {name!r}{did_you_mean(name, known)}",
            expected=", ".join(known) + ", or a file FILE.toml",
        )
    return _preset(name, known[name], _BUILTIN.name)


def _preset(name: str, table: Mapping[str, Any], where: object) -> Preset:
    kinds = {each.name: each.type for each in fields(Preset) if each.name != "name"}
    if unknown := sorted(table.keys() - kinds.keys()):
        raise PlanError(
            f"unknown key of a preset: {join_names(unknown)}{did_you_mean(unknown[0], kinds)}",
            where=where,
            expected=", ".join(kinds),
        )
    given = {key: _checked(key, str(kinds[key]), value, where) for key, value in table.items()}
    given["types"] = tuple(recipe_named(each, where).name for each in given.get("types", ()))
    given["schemes"] = tuple(codec_named(each, SafetensorsCodec).name for each in given.get("schemes", ()))
    if measured := [each for each in given["schemes"] if codec_named(each, SafetensorsCodec).measured]:
        raise PlanError(
            "a release cannot make a scheme that stores what enters each matrix at most",
            where=where,
            found=join_names(measured),
            expected="schemes that need no more than an importance matrix",
            fix="leave it out, and make it with bamba-quant fp4 --scheme and --calibrate",
        )
    made = (*given["types"], *given["schemes"])
    if not made or len(set(made)) < len(made):
        raise PlanError(
            "a preset has types or schemes, each once", where=where, found=join_names(made) or "none"
        )
    if strange := [each for each in given.get("tune", ()) if each not in made]:
        raise PlanError(
            f"tune names a file that is not made{did_you_mean(strange[0], made)}",
            where=where,
            found=join_names(strange),
            expected="some of " + ", ".join(made),
        )
    options = given.get("tune_options", {})
    allowed = [each.name for each in fields(TuneOptions) if each.name not in _NOT_TUNABLE]
    if wrong := sorted(options.keys() - set(allowed)):
        raise PlanError(
            f"unknown tuning option{did_you_mean(wrong[0], allowed)}",
            where=where,
            found=join_names(wrong),
            expected=", ".join(allowed),
        )
    for each in fields(TuneOptions):
        kinds_of = _TUNE_KINDS.get(str(each.type).removesuffix(" | None"), ())
        value = options.get(each.name)
        finite = math.isfinite(value) if isinstance(value, float) else True
        if each.name in options and not (type(value) in kinds_of and finite):
            raise PlanError(
                "a tuning option of another kind",
                where=where,
                found=f"{each.name} = {value!r}"[:80],
                expected=" or ".join(_NAMES_OF_KINDS[kind] for kind in kinds_of),
                fix="correct it in tune_options",
            )
    TuneOptions(**options)
    given["gates"] = gate_sections(given.get("gates", {}), where)
    return Preset(name, **given)


def _checked(key: str, kind: str, value: Any, where: object) -> Any:
    """``value`` as a field of this annotation holds it."""
    if kind.startswith("tuple"):
        good, expected = (
            isinstance(value, list) and all(isinstance(each, str) for each in value),
            "a list of texts",
        )
    elif kind == "int":
        least = 0 if key == "imatrix_chunks" else 1
        good, expected = type(value) is int and value >= least, f"a whole number, {least} or more"
    else:
        good, expected = (
            isinstance(value, str if kind == "str" else dict),
            "text" if kind == "str" else "a table",
        )
    if not good:
        raise PlanError(
            f"the value of {key} is of another kind", where=where, found=repr(value)[:80], expected=expected
        )
    return tuple(value) if isinstance(value, list) else value


class ReleaseError(BambaQuantError):
    """A release that cannot be made, continued or uploaded."""
