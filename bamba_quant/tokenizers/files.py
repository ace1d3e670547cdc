"""Which file is a directory's tokenizer, and the settings beside it."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from bamba_quant.errors import TokenizerError
from bamba_quant.files.json_file import read_json
from bamba_quant.files.regular_file import lexists

_NAMES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether ``tokenizer_file`` finds one."""
    return any(lexists(directory / name) for name in _NAMES)


def tokenizer_file(directory: Path) -> Path:
    """A SentencePiece model, which goes before a tokenizer.json made from it. Raises ``TokenizerError`` without either.

    Mistral calls the one of Codestral-Mamba tokenizer.model.v3.
    """
    for name in _NAMES:
        if lexists(directory / name):
            return directory / name
    raise TokenizerError(
        "the directory has no tokenizer",
        where=directory,
        expected="tokenizer.json or tokenizer.model",
        fix="copy the tokenizer's files there (state-spaces' models have GPT-NeoX's); to convert without a vocabulary: "
        "--no-vocab",
    )


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json as transformers merges them; empty when neither is there.

    The map counts only where tokenizer_config.json has no added_tokens_decoder. Raises ``TokenizerError`` where the
    two name different special tokens.
    """
    file, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = read_json(file, "the tokenizer's settings") if lexists(file) else {}
    if settings.get("added_tokens_decoder") is not None or not lexists(older):
        return settings
    named = read_json(older, "the special tokens")
    for key, value in named.items():
        ours, theirs = _content(settings.get(key)), _content(value)
        if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
            raise TokenizerError(
                "two files name different special tokens",
                where=f"{file} and {older.name}",
                found=f"{reprlib.repr(key)} is {reprlib.repr(ours)} and {reprlib.repr(theirs)}",
                expected="one token",
                fix="correct one of the two, or delete special_tokens_map.json",
            )
    return {**settings, **{key: value for key, value in named.items() if value is not None}}


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
