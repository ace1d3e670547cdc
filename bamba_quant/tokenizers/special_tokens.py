"""Which ids are special and which chat templates there are, from the small JSON files beside a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.json_file import read_json
from bamba_quant.errors import TokenizerError

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json beneath it; empty when neither is there."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            merged |= read_json(directory / name, "the tokenizer's settings")
    return merged


def special_ids(
    directory: Path,
    settings: Mapping[str, Any],
    vocab_size: int,
    id_of: Callable[[str], int | None],
    own: Mapping[str, int],
) -> dict[str, int]:
    """Ids by kind: those the settings name, then the tokenizer's ``own``, then config.json and generation_config.json.

    A model that stops at several tokens gets the first as "eos", the next two as "eot" and "eom". Raises
    ``TokenizerError`` for a special token that is not in the vocabulary.
    """
    ids: dict[str, int] = {}
    for kind in _KINDS:
        text = settings.get(f"{kind}_token")
        if isinstance(text, Mapping):
            text = text.get("content")
        if not isinstance(text, str):
            continue
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
    for name in ("config.json", "generation_config.json"):
        if not (directory / name).is_file():
            continue
        values = read_json(directory / name, "the model's settings")
        for kind in _KINDS:
            listed = values.get(f"{kind}_token_id")
            tokens = [
                token
                for token in (listed if isinstance(listed, list) else [listed])
                if isinstance(token, int) and 0 <= token < vocab_size
            ]
            if tokens:
                ids.setdefault(kind, tokens[0])
            if kind == "eos":
                _add_stops(ids, tokens)
    return ids


def _add_stops(ids: dict[str, int], tokens: list[int]) -> None:
    for token in tokens:
        if token not in ids.values():
            free = next((kind for kind in ("eot", "eom") if kind not in ids), None)
            if free is not None:
                ids[free] = token


def chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, the usual one under "default": from chat_template.jinja, .json or the tokenizer's settings."""
    found = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        found = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    elif found is None and (directory / "chat_template.json").is_file():
        found = read_json(directory / "chat_template.json", "a chat template").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        templates |= {entry["name"]: entry["template"] for entry in found}
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = extra.read_text(encoding="utf-8")
    return templates
