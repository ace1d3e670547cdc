"""Byte-level BPE from a tokenizer.json: the tokens, merges and added tokens that llama.cpp needs to split alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.errors import CheckpointError, TokenizerError, repr_short
from bamba_quant.files.json_file import optional, parse_json, required
from bamba_quant.files.reading import TOKENIZER_BYTES, read_bytes
from bamba_quant.tokenizers.added_tokens import (
    AddedTokens,
    BaseVocabulary,
    llama_cpp_differences,
    read_added_tokens,
)
from bamba_quant.tokenizers.library_guard import tokens_around
from bamba_quant.tokenizers.pretokenizers import (
    check_pretokenizer_name,
    normalizer_notes,
    recognize_pretokenizer,
)
from bamba_quant.tokenizers.settings import TokenizerConfig, read_tokenizer_config
from bamba_quant.tokenizers.special_tokens import chat_templates, special_ids
from bamba_quant.tokenizers.vocabulary import LARGEST_ID, Vocabulary, fill_embedding_rows, two_texts_error

_SPACE = "\u0120"  # how the byte-level alphabet writes a space

# Keys of a tokenizer.json.
_PARTS = (
    "model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding",
)  # fmt: skip

# Features of the BPE model that llama.cpp lacks, with the values that switch them off.
_SWITCHED_OFF = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "fuse_unk": (None, False),
}


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer.json with all that its directory adds: ``base`` is the model's vocabulary, text to id."""

    file: Path
    raw: bytes
    parsed: dict[str, Any]
    config: TokenizerConfig
    base: dict[str, int]
    added: AddedTokens


def read_tokenizer_json(file: Path, *, for_llama: bool = False) -> TokenizerJson:
    """Read ``file`` and the files beside it.

    Raises a ``BambaQuantError`` for ids and tokens that contradict each other and, with ``for_llama``, for a model
    that llama.cpp does not have.
    """
    raw = read_tokenizer_bytes(file)
    parsed = parse_json(raw, file)
    model = optional(parsed, "model", dict, file, TokenizerError) or {}
    if for_llama:
        _check_model(file, model)
    base = _vocab(file, model["vocab"]) if isinstance(model.get("vocab"), dict) else {}
    config = read_tokenizer_config(file.parent)
    added = read_added_tokens(config, BaseVocabulary.of_vocab(base), file, tokenizer=parsed)
    return TokenizerJson(file, raw, parsed, config, base, added)


def read_tokenizer_bytes(file: Path) -> bytes:
    """The content of a tokenizer.json. Raises ``CheckpointError`` as ``read_bytes``."""
    return read_bytes(file, "the tokenizer", TOKENIZER_BYTES)


def json_without_model(raw: bytes, file: Path) -> dict[str, Any] | None:
    """What a tokenizer.json holds before its model, or None where the model does not follow everything else.

    A model of 500,000 tokens takes as long to parse as the tokenizers library takes to load it. The library accepts
    no text that is not JSON; of ``raw`` that it has loaded this is everything but the model.
    """
    offsets = sorted(offset for key in _PARTS for offset in _values(raw, key))
    start = next(_values(raw, "model"), -1)
    if start < 0 or offsets[-1] > start:
        return None
    try:
        return parse_json(raw[:start].rstrip().removesuffix(b",") + b"}", file)
    except CheckpointError:  # this "model" is not a key of the top level
        return None


def _values(raw: bytes, key: str) -> Iterator[int]:
    """Offsets of ``key`` before a value that is not a number; a number is the id of such a token in a vocabulary."""
    name, value = b'"%s"' % key.encode(), re.compile(rb'"[a-z_]+"\s*:\s*[^\s0-9]')
    offset = raw.find(name)
    while offset >= 0:
        if value.match(raw, offset):
            yield offset
        offset = raw.find(name, offset + 1)


def read_byte_level_bpe(file: Path, vocab_size: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of ``file`` (a tokenizer.json) for an embedding of ``vocab_size`` rows.

    ``pre`` names llama.cpp's pre-tokenizer on the caller's word; otherwise it is recognised. Raises
    ``TokenizerError`` for any tokenizer that llama.cpp would not follow token by token.
    """
    read = read_tokenizer_json(file, for_llama=True)
    tokenizer, config, model = read.parsed, read.config, read.parsed["model"]
    if pre is None:
        name, notes = recognize_pretokenizer(tokenizer, file)
    else:
        name, notes = check_pretokenizer_name(pre), normalizer_notes(tokenizer, file)
    known = {token: (text, int(TokenType.NORMAL)) for text, token in read.base.items()}
    for added in read.added.tokens:
        known[added.token] = (added.text, int(added.type))
    tokens, types = fill_embedding_rows(known, vocab_size, file)
    ids = {text: token for token, (text, _) in known.items()}
    special, special_notes = special_ids(config, vocab_size, ids, {})
    add_bos, add_eos, more = _added_around(file, tokenizer, special, config)
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tokens,
        types=types,
        merges=_merges(file, read.base, required(model, "merges", list, file, TokenizerError)),
        special_ids=special,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates=chat_templates(config),
        notes=(
            *notes,
            *read.added.notes,
            *llama_cpp_differences(read.added.tokens, config),
            *more,
            *special_notes,
        ),
    )


def _check_model(file: Path, model: dict[str, Any]) -> None:
    if model.get("type") != "BPE" or not model.get("vocab") or "merges" not in model:
        raise TokenizerError(
            "the tokenizer is not byte-level BPE",
            where=file,
            found=f"a model of type {repr_short(model.get('type'))}",
            expected="BPE with vocab and merges",
            fix="if it came from SentencePiece, put its tokenizer.model into the directory",
        )
    optional(model, "ignore_merges", bool, file, TokenizerError)
    for key, off in _SWITCHED_OFF.items():
        if model.get(key) not in off:
            hint = (
                "; put the tokenizer.model it came from into the directory" if key == "byte_fallback" else ""
            )
            raise TokenizerError(
                f"the tokenizer uses BPE's {key}, which llama.cpp's byte-level BPE does not have",
                where=file,
                found=repr_short(model[key]),
                expected="none" + hint,
            )


def _vocab(file: Path, vocab: dict[str, Any]) -> dict[str, int]:
    texts: dict[int, str] = {}
    for text, token in vocab.items():
        if type(token) is not int or not 0 <= token <= LARGEST_ID:
            raise TokenizerError(
                "the vocabulary has an invalid token id",
                where=file,
                found=f"{repr_short(text)}: {repr_short(token)}",
                expected=f"an integer from 0 to {LARGEST_ID}",
            )
        if texts.setdefault(token, text) != text:
            raise two_texts_error(token, texts[token], text, file)
    return vocab


def _merges(file: Path, vocab: Mapping[str, int], merges: list[Any]) -> tuple[str, ...]:
    """Merges as strings of two parts; a space inside a part is written as the byte-level alphabet writes it."""
    joined = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        left, right = parts if isinstance(parts, list) and len(parts) == 2 else (None, None)
        if not (isinstance(left, str) and isinstance(right, str)):
            raise TokenizerError(
                "a merge does not have two parts",
                where=file,
                found=repr_short(merge),
                expected="two tokens",
            )
        if not (left in vocab and right in vocab and left + right in vocab):
            raise TokenizerError(
                "a merge has tokens that are not in the vocabulary",
                where=file,
                found=f"{repr_short(left)} and {repr_short(right)}",
                expected="both parts and their concatenation in vocab",
            )
        joined.append(f"{left.replace(' ', _SPACE)} {right.replace(' ', _SPACE)}")
    return tuple(joined)


def _added_around(
    file: Path, tokenizer: dict[str, Any], special: dict[str, int], config: TokenizerConfig
) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether encoding adds BOS before and EOS after a text, and notes."""
    before, after = tokens_around(tokenizer, file)
    if before not in ([], [special.get("bos")]) or after not in ([], [special.get("eos")]):
        raise TokenizerError(
            "the tokenizer adds special tokens that llama.cpp cannot add",
            where=file,
            found=f"{repr_short(before)} before and {repr_short(after)} after a text",
            expected=f"at most BOS ({special.get('bos')}) before and EOS ({special.get('eos')}) after",
        )
    notes = tuple(
        f"tokenizer_config.json says add_{kind}_token = {str(flag).lower()}, tokenizer.json does otherwise; "
        "tokenizer.json was followed"
        for kind, flag, does in (
            ("bos", config.flag("add_bos_token"), bool(before)),
            ("eos", config.flag("add_eos_token"), bool(after)),
        )
        if flag is not None and flag != does
    )
    return bool(before), bool(after), notes
