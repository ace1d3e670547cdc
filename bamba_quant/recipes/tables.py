"""Reads the tables of a recipe's TOML: names, choices for roles, and nothing that is not known."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.errors import PlanError, did_you_mean, join_names
from bamba_quant.recipes.base import CONDITIONS, Choice, Condition, InLayers

_MOST_LAYERS = 1024  # of a configuration
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

Checked = Callable[
    [Any, object], str
]  # the name of a format, of a value and where it stands; raises PlanError


def name_in(table: Mapping[str, Any], file: Path) -> str:
    """The name of the recipe in ``file``, by default the file's. Raises ``PlanError`` where no file can have it."""
    name = text_of(table, "name", file, file.stem)
    if not _NAME.fullmatch(name):
        raise PlanError(
            "a recipe's name is not valid in a file name",
            where=file,
            found=name[:80],
            expected="up to 64 letters, digits, - and _",
            fix="set name in the file",
        )
    return name


def role_choices(
    table: Mapping[str, Any], known: Collection[str], checked: Checked, where: object
) -> dict[str, tuple[Choice, ...]]:
    """The choices of the table ``roles`` by role; roles are ``known`` ones and formats ``checked``."""
    roles = {}
    for role, given in _table(table, "roles", where).items():
        if role not in known:
            raise PlanError(
                "no tensor that can be quantized has this role" + did_you_mean(role, known),
                where=f"{where}, [roles]",
                found=role[:80],
                expected=", ".join(sorted(known)),
            )
        choices = given if isinstance(given, list) else [given]
        if not choices:
            raise PlanError(
                "a role has no format",
                where=f"{where}, role {role}",
                found="an empty list",
                expected="a format, or a list of choices",
                fix="give a format, or leave the role out",
            )
        roles[role] = tuple(_choice(each, checked, f"{where}, role {role}") for each in choices)
    return roles


def _choice(given: Any, checked: Checked, where: str) -> Choice:
    """A format, or a table of one with the layers or the named condition it is for."""
    if not isinstance(given, dict):
        return Choice(checked(given, where))
    check_keys(given, {"format", "layers", "when"}, where)
    if len(given) != 2 or "format" not in given:
        raise PlanError(
            "a choice is not a format with layers or a condition",
            where=where,
            found=join_names(list(given)),
            expected='a format, or { format = "q6_k", layers = [0, 1] }, or { format = "q6_k", when = "more_bits" }',
        )
    return Choice(checked(given["format"], where), _condition(given, where))


def _condition(given: Mapping[str, Any], where: str) -> Condition:
    if "layers" in given:
        layers = given["layers"]
        if (
            not isinstance(layers, list)
            or len(layers) > _MOST_LAYERS
            or not all(type(each) is int and 0 <= each < _MOST_LAYERS for each in layers)
        ):
            raise PlanError(
                "layers is not a list of layer numbers", where=where, expected="integers from 0 on"
            )
        return InLayers(frozenset(layers))
    name = text_of(given, "when", where)
    if name not in CONDITIONS:
        what = f"no condition has this name{did_you_mean(name, CONDITIONS)}"
        raise PlanError(what, where=where, found=name[:80], expected=", ".join(CONDITIONS))
    return CONDITIONS[name]


def text_of(table: Mapping[str, Any], key: str, where: object, default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or (not value and default is None):
        raise PlanError(f"{key} is not a string", where=where)
    return value


def _table(table: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise PlanError(
            f"{key} is not a TOML table", where=where, found=type(value).__name__, expected=f"[{key}]"
        )
    return value


def check_keys(table: Mapping[str, Any], keys: frozenset[str] | set[str], where: object) -> None:
    unknown = [key[:80] for key in table if key not in keys]
    if unknown:
        raise PlanError(
            f"the recipe has unknown keys{did_you_mean(unknown[0], keys)}",
            where=where,
            found=join_names(unknown),
            expected=", ".join(sorted(keys)),
        )
