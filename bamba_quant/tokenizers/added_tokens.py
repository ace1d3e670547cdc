"""The tokens that a directory's files add to a base vocabulary, with the ids and flags that AutoTokenizer gives them.

transformers 5 (tokenization_utils_base.py, ``_from_pretrained``) takes them from ``added_tokens`` of tokenizer.json,
``added_tokens_decoder`` of tokenizer_config.json or added_tokens.json, and from every special token that the settings
name. Conversion, encoding and decoding all use this one list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from gguf import TokenType

from bamba_quant.errors import TokenizerError, repr_short
from bamba_quant.files.json_file import object_list, optional, read_json, required
from bamba_quant.files.reading import TOKENIZER_BYTES, lexists
from bamba_quant.tokenizers.settings import TokenizerConfig
from bamba_quant.tokenizers.vocabulary import LARGEST_ID, two_ids_error, two_texts_error

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """An added token: text that is matched before the base vocabulary sees it. Flags as in the tokenizers library."""

    token: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def type(self) -> TokenType:
        """GGUF's type of token."""
        return TokenType.CONTROL if self.special else TokenType.USER_DEFINED


@dataclass(frozen=True)
class AddedTokens:
    """All added tokens in the order of their ids, and notes on what transformers or llama.cpp do differently."""

    tokens: tuple[AddedToken, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseVocabulary:
    """The ``size`` tokens of a model without the added ones; both lookups give None for what is not there.

    ``largest_id`` is -1 where there are none.
    """

    id_of: Callable[[str], int | None]
    text_of: Callable[[int], str | None]
    size: int
    largest_id: Callable[[], int]

    @classmethod
    def of_vocab(cls, vocab: Mapping[str, int]) -> Self:
        """That of a parsed file, text to id."""
        texts = {token: text for text, token in vocab.items()}
        return cls(vocab.get, texts.get, len(vocab), lambda: max(texts, default=-1))

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Self:
        """That of a ``tokenizers.Tokenizer``, read token by token: fetching all takes half as long as loading it."""
        return cls(
            tokenizer.model.token_to_id,
            tokenizer.model.id_to_token,
            tokenizer.get_vocab_size(with_added_tokens=False),
            lambda: max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1),
        )


def read_added_tokens(
    config: TokenizerConfig,
    base: BaseVocabulary,
    file: Path,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    renames: bool = False,
) -> AddedTokens:
    """What the files of the directory add to ``base``, the vocabulary of ``file``.

    ``tokenizer`` is its parsed tokenizer.json, if there is one already. With ``renames`` an added token may take the
    id of a base token, as for placeholders of a SentencePiece model. Raises ``TokenizerError`` where two files
    contradict each other, and for a BOS or EOS without an id.
    """
    found = _Collector(base, file, renames)
    json_file = config.directory / "tokenizer.json"
    if tokenizer is None:
        tokenizer = read_json(json_file, "the tokenizer", TOKENIZER_BYTES) if lexists(json_file) else {}
    for entry in object_list(tokenizer, "added_tokens", json_file, TokenizerError):
        found.add(_parsed_token(entry, json_file), json_file)
    decoder = optional(config.values, "added_tokens_decoder", dict, config.file, TokenizerError)
    with_flags = set() if decoder is not None else set(found.tokens)
    named = list(config.special_tokens())
    listed = config.directory / "added_tokens.json"
    if lexists(listed):
        special = {text for _, text, _ in named}
        texts = read_json(listed, "tokens added to the model")
        for text in texts:
            token = _checked_id(required(texts, text, int, listed, TokenizerError), listed)
            found.check(token, text, listed)
            if text not in found.tokens:  # the flags of tokenizer.json are kept
                found.add(AddedToken(token, text, text in special, normalized=text not in special), listed)
        with_flags |= set() if decoder is not None else set(texts)
    for key in decoder or {}:
        entry = required(decoder or {}, key, dict, config.file, TokenizerError)
        if not (key.isascii() and key.isdigit() and len(key) < 11):
            raise TokenizerError(
                "added_tokens_decoder has a key that is not an id",
                where=config.file,
                found=repr_short(key),
                expected="digits",
            )
        one = _parsed_token({**entry, "id": int(key)}, config.file)
        found.add(one, config.file)
        with_flags.add(one.text)
    for kind, text, flags in named:
        found.name(kind, text, flags if text not in with_flags else None, config.file)
    return found.sorted()


def llama_cpp_differences(tokens: tuple[AddedToken, ...], config: TokenizerConfig) -> Iterator[str]:
    """Notes on flags and settings that a GGUF cannot store."""
    if config.splits_special:
        yield (
            "tokenizer_config.json says split_special_tokens = true; GGUF cannot say so, and with llama.cpp the caller "
            "decides"
        )
    trimming = [one.text for one in tokens if one.lstrip or one.rstrip or one.single_word]
    if not trimming:
        return
    yield (
        f"{len(trimming)} added tokens (the first {repr_short(trimming[0])}) take neighbouring white space or only "
        "whole words with them; llama.cpp does not"
    )


class _Collector:
    """The tokens collected so far, checked against each other and against the base vocabulary."""

    def __init__(self, base: BaseVocabulary, file: Path, renames: bool) -> None:
        self.base, self.file, self.renames = base, file, renames
        self.tokens: dict[str, AddedToken] = {}
        self.owners: dict[int, tuple[str, Path]] = {}
        self.unstated: list[AddedToken] = []

    def check(self, token: int, text: str, file: Path) -> None:
        """Raise ``TokenizerError`` when ``token`` or ``text`` is taken."""
        other, owner = self.owners.get(token, (text, file))
        if other != text:
            entries = "entries" if owner == file else "files"
            what = f"two {entries} add different tokens under one id"
            raise two_texts_error(token, other, text, _both_files(file, owner), what)
        held = self.tokens.get(text)
        if held is not None and held.token != token:
            raise two_ids_error(text, held.token, token, _both_files(file, self.owners[held.token][1]))
        base_id, base_text = self.base.id_of(text), self.base.text_of(token)
        if base_id is not None and base_id != token:
            raise two_ids_error(text, base_id, token, _both_files(file, self.file))
        if not self.renames and base_text is not None and base_text != text:
            raise two_texts_error(token, base_text, text, _both_files(file, self.file))

    def add(self, one: AddedToken, file: Path) -> None:
        """Add a token, or give one that is there already the flags of a later file, as AutoTokenizer does."""
        self.check(one.token, one.text, file)
        self._store(one, file)

    def name(self, kind: str, text: str, flags: Mapping[str, Any] | None, file: Path) -> None:
        """Make ``text`` a special token, with ``flags`` unless None; AutoTokenizer adds one that is missing."""
        held = self.tokens.get(text)
        token = held.token if held is not None else self.base.id_of(text)
        if token is None:
            if kind in ("bos", "eos") or not text:
                raise TokenizerError(
                    f"the {kind} token is not in the vocabulary",
                    where=file.parent,
                    found=repr_short(text),
                    fix=f"correct {kind}_token in {file.name}",
                )
            token = max(self.base.largest_id(), *self.owners, -1) + 1
            self.unstated.append(AddedToken(token, text))
        one = held if held is not None and flags is None else _with_flags(token, text, flags or {}, file)
        self._store(replace(one, special=True), file)

    def _store(self, one: AddedToken, file: Path) -> None:
        self.owners.setdefault(one.token, (one.text, file))
        self.tokens[one.text] = one

    def sorted(self) -> AddedTokens:
        tokens = tuple(sorted(self.tokens.values(), key=lambda one: one.token))
        notes = []
        if self.unstated:
            first = self.unstated[0]
            notes.append(
                f"{len(self.unstated)} special tokens have no id in any file; they got the next ones, as in "
                f"transformers (the first, {repr_short(first.text)}, has {first.token})"
            )
        moved = self._moved(tokens)
        if moved is not None:
            notes.append(
                f"transformers numbers added tokens on without a gap and gives {repr_short(moved[0].text)} the id "
                f"{moved[1]}; the files say {moved[0].token} and were followed"
            )
        renamed = [one for one in tokens if self.base.text_of(one.token) not in (None, one.text)]
        if renamed:
            first = renamed[0]
            notes.append(
                f"{len(renamed)} added tokens replace base tokens (the first, id {first.token}: "
                f"{repr_short(first.text)} instead of {repr_short(self.base.text_of(first.token))})"
            )
        return AddedTokens(tokens, tuple(notes))

    def _moved(self, tokens: tuple[AddedToken, ...]) -> tuple[AddedToken, int] | None:
        """The first token to which the tokenizers library would give another id, and that id."""
        last = -1
        for one in tokens:
            if self.base.id_of(one.text) is None and self.base.text_of(one.token) is None:
                last = max(last + 1, self.base.size)
                if last != one.token:
                    return one, last
            else:
                last = max(last, one.token)
        return None


def _both_files(file: Path, other: Path) -> str:
    return f"{file}" if file == other else f"{other} and {file}"


def _with_flags(token: int, text: str, flags: Mapping[str, Any], file: object) -> AddedToken:
    read = {key: bool(optional(flags, key, bool, file, TokenizerError)) for key in _FLAGS}
    return AddedToken(token, text, **read)


def _parsed_token(entry: Mapping[str, Any], file: Path) -> AddedToken:
    token = _checked_id(required(entry, "id", int, file, TokenizerError), file)
    text = required(entry, "content", str, file, TokenizerError)
    if not text:
        raise TokenizerError(
            "an added token has no text",
            where=file,
            found=f"id {token}",
            expected="a content that is not empty",
        )
    one = _with_flags(token, text, entry, file)
    # The library's default: only special tokens are looked for in the text as it is.
    return one if entry.get("normalized") is not None else replace(one, normalized=not one.special)


def _checked_id(token: int, file: Path) -> int:
    if not 0 <= token <= LARGEST_ID:
        raise TokenizerError(
            "a token has an id out of range",
            where=file,
            found=repr_short(token),
            expected=f"an id from 0 to {LARGEST_ID}",
        )
    return token
