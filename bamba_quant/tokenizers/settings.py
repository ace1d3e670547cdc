"""Which file is a directory's tokenizer, and the special tokens that the settings beside it name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamba_quant.errors import TokenizerError, repr_short
from bamba_quant.files.json_file import optional, read_json, required
from bamba_quant.files.reading import lexists

SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MOST_NAMED_TOKENS = 10_000  # keys for single tokens; real settings have about ten
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.model.v3", "tokenizer.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether ``tokenizer_file`` finds one."""
    return any(lexists(directory / name) for name in _TOKENIZER_FILES)


def tokenizer_file(directory: Path) -> Path:
    """A SentencePiece model, which goes before a tokenizer.json made from it. Raises ``TokenizerError`` without either.

    Mistral calls the one of Codestral-Mamba tokenizer.model.v3.
    """
    for name in _TOKENIZER_FILES:
        if lexists(directory / name):
            return directory / name
    raise TokenizerError(
        "the directory has no tokenizer",
        where=directory,
        expected="tokenizer.json or tokenizer.model",
        fix="copy the tokenizer's files there (state-spaces' models have GPT-NeoX's); to convert without a vocabulary: "
        "--no-vocab",
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """``values`` of tokenizer_config.json in ``directory``, with those of special_tokens_map.json."""

    directory: Path
    values: Mapping[str, Any]

    @property
    def file(self) -> Path:
        return self.directory / "tokenizer_config.json"

    def flag(self, key: str) -> bool | None:
        """A boolean, None where it is missing. Raises ``TokenizerError`` for any other value."""
        return optional(self.values, key, bool, self.file, TokenizerError)

    @property
    def splits_special(self) -> bool:
        """Whether a special token inside a text is encoded as ordinary text."""
        return bool(self.flag("split_special_tokens"))

    def special_token(self, kind: str) -> str | None:
        """The text of ``{kind}_token``. Raises ``TokenizerError`` for a value that is not a token."""
        text = self.values.get(f"{kind}_token")
        if isinstance(text, Mapping):
            text = required(text, "content", str, f"{self.file}, {kind}_token", TokenizerError)
        if text is not None and not isinstance(text, str):
            raise TokenizerError(
                f"{kind}_token is not a token",
                where=self.file,
                found=repr_short(text),
                expected="a string, or an object with content",
            )
        return text

    def special_tokens(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Kind, text and flags of each special token that is named, in the order AutoTokenizer adds them."""
        for kind in SPECIAL_KINDS:
            text = self.special_token(kind)
            if text is not None:
                value = self.values[f"{kind}_token"]
                yield kind, text, value if isinstance(value, Mapping) else {}
        keys = [key for key in self.values if key.endswith("_token")]
        if len(keys) > _MOST_NAMED_TOKENS:
            raise TokenizerError(
                "the settings name too many special tokens",
                where=self.file,
                found=f"{len(keys):,} keys that end in _token",
                expected=f"at most {_MOST_NAMED_TOKENS:,}",
            )
        for key in keys:
            value, kind = self.values[key], key.removesuffix("_token")
            if kind not in SPECIAL_KINDS and isinstance(value, str):
                yield kind, value, {}
        for key in ("extra_special_tokens", "additional_special_tokens"):
            extra = self.values.get(key)
            tokens = list(extra.values()) if isinstance(extra, Mapping) else extra or []
            if not isinstance(tokens, list) or not all(isinstance(token, str | dict) for token in tokens):
                raise TokenizerError(
                    f"{key} is not a list of tokens",
                    where=self.file,
                    found=repr_short(extra),
                    expected="strings, or objects with content",
                )
            for token in tokens:
                flags = token if isinstance(token, dict) else {"content": token}
                yield key.removesuffix("s"), required(flags, "content", str, self.file, TokenizerError), flags
            if tokens:
                return


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """tokenizer_config.json and special_tokens_map.json as transformers merges them; empty when neither is there.

    The map counts only where tokenizer_config.json has no added_tokens_decoder. Raises ``TokenizerError`` where the
    two name different special tokens.
    """
    file, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    values = read_json(file, "the tokenizer's settings") if lexists(file) else {}
    if values.get("added_tokens_decoder") is not None or not lexists(older):
        return TokenizerConfig(directory, values)
    named = read_json(older, "the special tokens")
    for key, value in named.items():
        ours, theirs = _content(values.get(key)), _content(value)
        if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
            raise TokenizerError(
                "two files name different special tokens",
                where=f"{file} and {older.name}",
                found=f"{repr_short(key)} is {repr_short(ours)} and {repr_short(theirs)}",
                expected="one token",
                fix="correct one of the two, or delete special_tokens_map.json",
            )
    return TokenizerConfig(
        directory, values | {key: value for key, value in named.items() if value is not None}
    )


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
