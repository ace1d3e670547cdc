"""Which file is a directory's tokenizer, and the tokens that files beside a vocabulary add to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.json_file import objects, optional, read_json, required
from bamba_quant.errors import TokenizerError


@dataclass(frozen=True)
class Added:
    """A token added to a vocabulary; ``special`` ones are control tokens, which no text spells."""

    token: int
    text: str
    special: bool


_NAMES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether ``tokenizer_file`` finds one."""
    return any((directory / name).is_file() for name in _NAMES)


def tokenizer_file(directory: Path) -> Path:
    """A SentencePiece model, which goes before a tokenizer.json made from it. Raises ``TokenizerError`` without either.

    Mistral calls the one of Codestral-Mamba tokenizer.model.v3.
    """
    for name in _NAMES:
        if (directory / name).is_file():
            return directory / name
    raise TokenizerError(
        "the directory has no tokenizer",
        where=directory,
        expected="tokenizer.json or tokenizer.model",
        fix="copy the tokenizer's files there (state-spaces' models have GPT-NeoX's); to convert without a vocabulary: "
        "--no-vocab",
    )


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json beneath it; empty when neither is there."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            merged |= read_json(directory / name, "the tokenizer's settings")
    return merged


def listed_tokens(tokenizer: Mapping[str, Any], file: Path) -> list[Added]:
    """``added_tokens`` of a parsed tokenizer.json. Raises ``TokenizerError`` for entries that are none."""
    return [_added(entry, file) for entry in objects(tokenizer, "added_tokens", file, TokenizerError)]


def added_tokens(directory: Path, settings: Mapping[str, Any]) -> list[Added]:
    """What all files beside a SentencePiece model add, later ones with the last word on a token's kind.

    Raises ``TokenizerError`` when two of them give one id different texts.
    """
    found: dict[int, Added] = {}

    def add(more: list[Added], file: Path) -> None:
        for one in more:
            other = found.setdefault(one.token, one)
            if other.text != one.text:
                raise TokenizerError(
                    "two files add different tokens under one id",
                    where=file,
                    found=f"id {one.token} is {other.text!r} and {one.text!r}",
                    fix="take all files from one version of the tokenizer",
                )
            found[one.token] = one

    file = directory / "added_tokens.json"
    if file.is_file():
        texts = read_json(file, "tokens added to the model")
        add([Added(required(texts, text, int, file, TokenizerError), text, False) for text in texts], file)
    file = directory / "tokenizer.json"
    if file.is_file():
        add(listed_tokens(read_json(file, "the tokenizer"), file), file)
    file = directory / "tokenizer_config.json"
    decoder = optional(settings, "added_tokens_decoder", dict, file, TokenizerError) or {}
    for token in decoder:
        entry = required(decoder, token, dict, file, TokenizerError)
        if not (token.isascii() and token.isdigit()):
            raise TokenizerError(
                "added_tokens_decoder has a key that is no id",
                where=file,
                found=repr(token),
                expected="digits",
            )
        add([_added(entry | {"id": int(token)}, file)], file)
    return list(found.values())


def _added(entry: Mapping[str, Any], file: Path) -> Added:
    return Added(
        required(entry, "id", int, file, TokenizerError),
        required(entry, "content", str, file, TokenizerError),
        bool(optional(entry, "special", bool, file, TokenizerError)),
    )
