"""Recipes as TOML: the built-in ones, strict reading of a user's file, and any recipe written in the same form."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.errors import BambaQuantError, PlanError, did_you_mean, join_names, repr_short
from bamba_quant.families import families
from bamba_quant.files.toml_file import read_toml
from bamba_quant.printable import printable
from bamba_quant.recipes.base import ALWAYS_F32, CONDITIONS, Assignment, Choice, InLayers, Recipe, anywhere
from bamba_quant.recipes.tables import check_keys, name_in, role_choices, text_of

_KEYS = frozenset({"name", "like", "about", "default", "roles", "tensors", "candidates", "refine"})
_BUILTIN = Path(__file__).with_name("builtin.toml")
_BUILTIN_KEYS = (_KEYS - {"name"}) | {"aliases", "file_type", "needs_importance"}
_MOST_TENSORS = 1 << 16
_MOST_CANDIDATES = 64


@functools.cache
def _builtin() -> tuple[dict[str, Recipe], dict[str, str]]:
    """The built-in recipes by name, and the names that their aliases stand for."""
    known: dict[str, Recipe] = {}
    aliases: dict[str, str] = {}
    for name, table in tomllib.loads(_BUILTIN.read_text()).items():
        where = f"{_BUILTIN.name}, {name}"
        check_keys(table, _BUILTIN_KEYS, where)
        if "like" in table:
            like = known[table["like"]]
        else:
            file_type, needs = LlamaFileType[table["file_type"]], frozenset(table.get("needs_importance", ()))
            like = Recipe(name, file_type, table["default"], "", needs_importance=needs)
        known[name] = _recipe(table, name, like, where)
        aliases |= dict.fromkeys(table.get("aliases", ()), name)
    return known, aliases


def recipes() -> tuple[Recipe, ...]:
    """The built-in recipes."""
    return tuple(_builtin()[0].values())


def recipe_named(name: str, where: object = None, *, auto: bool = False) -> Recipe:
    """The built-in recipe with this name or alias, in any case.

    Raises ``PlanError`` listing the names, with "auto" where the caller also takes that. ``where`` is for the message.
    """
    known, aliases = _builtin()
    key = name.lower()
    if aliases.get(key, key) not in known:
        names = [*(["auto"] if auto else []), *known, *aliases]
        what = f"no built-in recipe is called {repr_short(name)}{did_you_mean(name, names)}"
        scheme = re.match("fp[48]|nvfp4|mxfp4a|int[48]|w[48]a", key)
        fix = "bamba-quant fp8, int4 and fp4 write these" if scheme else None
        raise PlanError(what, where=where, expected=", ".join(names), fix=fix)
    return known[aliases.get(key, key)]


def plain_recipe(file_type: int | None) -> Recipe | None:
    """The built-in recipe with this ``general.file_type``, the first of several; None for other numbers."""
    return next((known for known in recipes() if known.file_type == file_type), None)


def read_recipe(file: Path) -> Recipe:
    """The recipe in a TOML file: ``name``, ``about``, ``default``, ``[roles]``, ``[[tensors]]``; ``like``, a built-in
    recipe whose type ``general.file_type`` states and whose formats hold for whatever the file does not mention; and
    ``candidates``, formats between which bits are moved as ``hybrid`` does; ``refine``, true for the longer search.

    Raises ``PlanError`` for unknown keys, roles and formats, and for values of another type.
    """
    table = read_toml(file, "recipe's tables", PlanError)
    check_keys(table, _KEYS, file)
    name = name_in(table, file)
    if "like" not in table:
        raise PlanError(
            "the recipe does not set 'like'",
            where=file,
            expected='a line such as like = "q4_k_m"',
        )
    return _recipe(table, name, recipe_named(text_of(table, "like", file), f"{file}, like"), file)


def _recipe(table: Mapping[str, Any], name: str, like: Recipe, where: object) -> Recipe:
    """``like`` with what ``table`` says."""
    roles = {**like.roles, **role_choices(table, quantized_roles(), _format, where)}
    candidates = table.get("candidates", list(like.candidates))
    if not isinstance(candidates, list) or len(candidates) > _MOST_CANDIDATES:
        raise PlanError(
            f"candidates in the recipe is not a list of at most {_MOST_CANDIDATES} formats",
            where=where,
            found=f"{len(candidates)} formats" if isinstance(candidates, list) else repr_short(candidates),
            expected='candidates = ["q4_k", "q6_k"]',
        )
    refine = table.get("refine", like.refine)
    if not isinstance(refine, bool):
        raise PlanError(
            "refine in the recipe is neither true nor false",
            where=where,
            found=repr_short(refine),
            expected="refine = true",
        )
    tensors = table.get("tensors", [])
    if not isinstance(tensors, list) or len(tensors) > _MOST_TENSORS:
        raise PlanError(
            f"tensors in the recipe is not a list of at most {_MOST_TENSORS} tables",
            where=where,
            found=f"{len(tensors)} tables" if isinstance(tensors, list) else repr_short(tensors),
            expected="[[tensors]]",
        )
    return replace(
        like,
        name=name,
        refine=refine,
        about=text_of(table, "about", where, ""),
        default=_format(table["default"], f"{where}, default") if "default" in table else like.default,
        roles=roles,
        candidates=tuple(dict.fromkeys(_format(each, f"{where}, candidates") for each in candidates)),
        tensors=(*(_assignment(each, f"{where}, [[tensors]]") for each in tensors), *like.tensors),
    )


def recipe_text(recipe: Recipe, like: str, comment: str = "") -> str:
    """``recipe`` as ``read_recipe`` reads it, like the built-in recipe ``like``, after ``comment``."""
    base = recipe_named(like)
    lines = [f"# {printable(line)}".rstrip() for line in comment.splitlines()]
    lines += [f"name = {quoted(recipe.name)}", f"like = {quoted(like)}"]
    if recipe.about:
        lines.append(f"about = {quoted(printable(recipe.about))}")
    lines.append(f"default = {quoted(recipe.default)}")
    # What the file does not mention is the base's, so that an empty list is stated where the base has another.
    if recipe.refine or base.refine:
        lines.append(f"refine = {str(recipe.refine).lower()}")
    if recipe.candidates or base.candidates:
        lines.append(f"candidates = [{', '.join(map(quoted, recipe.candidates))}]")
    lines += roles_text(recipe.roles)
    for each in recipe.tensors:
        key, value = ("name", each.name) if each.name else ("pattern", each.pattern)
        lines += ["", "[[tensors]]", f"{key} = {quoted(value)}", f"format = {quoted(each.format)}"]
    return "\n".join(lines) + "\n"


def quantized_roles() -> frozenset[str]:
    """The roles of tensors that can be quantized, of every family."""
    rules = (rule for family in families() for rule in family.rules)
    return frozenset(rule.role for rule in rules if rule.gguf is not None) - ALWAYS_F32


def roles_text(roles: Mapping[str, tuple[Choice, ...]]) -> list[str]:
    """The lines of the table ``roles``, which ``role_choices`` reads."""
    lines = ["", "[roles]"] if roles else []
    for role, choices in roles.items():
        written = [_written(choice) for choice in choices]
        lines.append(f"{role} = " + (written[0] if len(written) == 1 else f"[{', '.join(written)}]"))
    return lines


def _written(choice: Choice) -> str:
    if choice.when is anywhere:
        return quoted(choice.format)
    if isinstance(choice.when, InLayers):
        place = f"layers = {sorted(choice.when.layers)}"
    else:
        place = f"when = {quoted(next(name for name, known in CONDITIONS.items() if known is choice.when))}"
    return f"{{ format = {quoted(choice.format)}, {place} }}"


def quoted(text: str) -> str:
    """A TOML string."""
    # TOML has JSON's escapes but for halves of surrogate pairs, and no DEL as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _assignment(given: Any, where: str) -> Assignment:
    if not isinstance(given, dict):
        raise PlanError("an entry of tensors is not a TOML table", where=where, found=type(given).__name__)
    check_keys(given, {"name", "pattern", "format"}, where)
    if len(given) != 2 or "format" not in given:
        raise PlanError(
            "an entry of tensors is not a name or a pattern with a format",
            where=where,
            found=join_names(list(given)),
            expected="name and format, or pattern and format",
        )
    chosen = _format(given["format"], where)
    if "name" in given:
        return Assignment(chosen, name=text_of(given, "name", where))
    pattern = text_of(given, "pattern", where)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PlanError(
            "a pattern of tensors is not a regular expression", where=where, found=f"{pattern[:80]}: {error}"
        ) from error
    return Assignment(chosen, pattern=pattern)


def _format(given: Any, where: object) -> str:
    if not isinstance(given, str):
        raise PlanError("a format is not a name", where=where, expected='a string such as "q6_k"')
    try:
        found = codec_named(given, BlockCodec)
    except BambaQuantError as error:
        raise PlanError(error.what, where=where, expected=error.expected) from error
    if not found.writable:
        raise PlanError(f"{found.name} can be read but not written", where=where, fix="choose another format")
    return found.name
