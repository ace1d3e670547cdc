"""The special tokens that a tokenizer's settings name, each by a key of its own or in a list."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.errors import TokenizerError
from bamba_quant.files.json_file import required

SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MOST = 10_000  # keys for single tokens; real settings have about ten


def special_token_text(settings: Mapping[str, Any], kind: str, where: object) -> str | None:
    """The text of ``{kind}_token``. Raises ``TokenizerError`` for a value that is not a token."""
    text = settings.get(f"{kind}_token")
    if isinstance(text, Mapping):
        text = required(text, "content", str, f"{where}, {kind}_token", TokenizerError)
    if text is not None and not isinstance(text, str):
        raise TokenizerError(
            f"{kind}_token is not a token",
            where=where,
            found=reprlib.repr(text),
            expected="a string, or an object with content",
        )
    return text


def named_special_tokens(
    settings: Mapping[str, Any], where: Path
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Kind, text and flags of each special token that the settings name, in the order AutoTokenizer adds them."""
    for kind in SPECIAL_KINDS:
        text = special_token_text(settings, kind, where)
        if text is not None:
            value = settings[f"{kind}_token"]
            yield kind, text, value if isinstance(value, Mapping) else {}
    keys = [key for key in settings if key.endswith("_token")]
    if len(keys) > _MOST:
        raise TokenizerError(
            "the settings name too many special tokens",
            where=where,
            found=f"{len(keys):,} keys that end in _token",
            expected=f"at most {_MOST:,}",
        )
    for key in keys:
        value = settings[key]
        kind = key.removesuffix("_token")
        if kind not in SPECIAL_KINDS and isinstance(value, str):
            yield kind, value, {}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = settings.get(key)
        values = list(extra.values()) if isinstance(extra, Mapping) else extra or []
        if not isinstance(values, list) or not all(isinstance(value, str | dict) for value in values):
            raise TokenizerError(
                f"{key} is not a list of tokens",
                where=where,
                found=reprlib.repr(extra),
                expected="strings, or objects with content",
            )
        for value in values:
            flags = value if isinstance(value, dict) else {"content": value}
            yield key.removesuffix("s"), required(flags, "content", str, where, TokenizerError), flags
        if values:
            return
