"""Which ids are special and which chat templates there are, from the small JSON files beside a tokenizer."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.json_file import objects, read_json, read_text, required
from bamba_quant.checkpoint.links import check_link
from bamba_quant.errors import TokenizerError

_STOPS = ("eos", "eot", "eom")  # where llama.cpp looks for tokens that end a text
_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")


def special_ids(
    directory: Path,
    settings: Mapping[str, Any],
    vocab_size: int,
    id_of: Callable[[str], int | None],
    own: Mapping[str, int],
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ids by kind, and notes: as the settings name them, then the tokenizer itself, then the model's settings.

    A model that stops at several tokens gets the first as "eos", the next two as "eot" and "eom"; notes name
    those beyond, and ids that the embedding has no row for. Raises ``TokenizerError`` for a special token that is
    not in the vocabulary and for settings of another kind.
    """
    ids: dict[str, int] = {}
    for kind in _KINDS:
        text = settings.get(f"{kind}_token")
        if isinstance(text, Mapping):
            text = required(text, "content", str, f"{directory}, {kind}_token", TokenizerError)
        if text is None:
            continue
        if not isinstance(text, str):
            raise TokenizerError(
                f"{kind}_token is no token",
                where=directory / "tokenizer_config.json",
                found=reprlib.repr(text),
                expected="a string, or an object with content",
            )
        token = id_of(text)
        if token is None:
            raise TokenizerError(
                f"the {kind} token is not in the vocabulary",
                where=directory,
                found=repr(text),
                fix=f"correct {kind}_token in tokenizer_config.json",
            )
        ids[kind] = token
    ids = {**own, **ids}
    notes: list[str] = []
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        values = read_json(file, "the model's settings")
        for kind in _KINDS:
            listed = _token_ids(values, f"{kind}_token_id", file)
            tokens = [token for token in listed if token < vocab_size]
            notes += [
                f"{name} says {kind}_token_id = {token}, which no row of the embedding has; it was left out"
                for token in listed
                if token >= vocab_size
            ]
            if tokens:
                ids.setdefault(kind, tokens[0])
            if kind == "eos":
                notes += [
                    f"{name} stops at token {token} too; GGUF has room for three such tokens, so llama.cpp will not"
                    for token in _without_room(ids, tokens)
                ]
    return ids, tuple(dict.fromkeys(notes))


def _token_ids(values: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """One id or a list; -1 says that there is none."""
    listed = values.get(key)
    tokens = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and token >= -1 for token in tokens):
        raise TokenizerError(
            f"{key} is no token id",
            where=file,
            found=reprlib.repr(listed),
            expected="an id, or a list of ids",
        )
    return [token for token in tokens if token >= 0]


def _without_room(ids: dict[str, int], tokens: list[int]) -> list[int]:
    """Put ``tokens`` among the stops of ``ids``; those that find no place."""
    left = []
    for token in tokens:
        if token in (ids.get(kind) for kind in _STOPS):
            continue
        free = next((kind for kind in _STOPS if kind not in ids), None)
        if free is None:
            left.append(token)
        else:
            ids[free] = token
    return left


def chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, the usual one under "default": from chat_template.jinja, .json or the tokenizer's settings."""
    found, where = settings.get("chat_template"), directory / "tokenizer_config.json"
    if (directory / "chat_template.jinja").is_file():
        check_link(directory / "chat_template.jinja", directory)
        found = read_text(directory / "chat_template.jinja", "a chat template")
    elif found is None and (directory / "chat_template.json").is_file():
        where = directory / "chat_template.json"
        found = read_json(where, "a chat template").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        for entry in objects({"chat_template": found}, "chat_template", where, TokenizerError):
            name = required(entry, "name", str, where, TokenizerError)
            _add_template(templates, name, required(entry, "template", str, where, TokenizerError), where)
    elif found is not None:
        raise TokenizerError(
            "the chat template is no template",
            where=where,
            found=reprlib.repr(found),
            expected="a string, or a list of objects with name and template",
        )
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        check_link(extra, directory)
        _add_template(templates, extra.stem, read_text(extra, "a chat template"), extra)
    return templates


def _add_template(templates: dict[str, str], name: str, text: str, where: Path) -> None:
    if name in templates or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise TokenizerError(
            "a chat template's name is taken already, or is no text",
            where=ascii(str(where)),
            found=ascii(name),
            expected="names that differ",
        )
    templates[name] = text
