"""Text to token ids and back, by the tokenizer of a Hugging Face directory or by the vocabulary inside a GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.errors import TokenizerError, repr_short
from bamba_quant.tokenizers.added_tokens import AddedToken, BaseVocabulary, read_added_tokens
from bamba_quant.tokenizers.byte_level_bpe import (
    json_without_model,
    read_tokenizer_bytes,
    read_tokenizer_json,
)
from bamba_quant.tokenizers.export import build_bpe_tokenizer, build_sentencepiece_model
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.library_guard import check_pipeline, library_errors, quiet_stderr, tokens_around
from bamba_quant.tokenizers.sentencepiece_codec import sentencepiece_codec, to_library_token
from bamba_quant.tokenizers.sentencepiece_model import read_sentencepiece_files
from bamba_quant.tokenizers.settings import read_tokenizer_config, tokenizer_file
from bamba_quant.tokenizers.vocabulary import is_filler

# Patterns that take exponential time often show it at a repeated letter.
_PROBE = "a" * 64 + "!"


@dataclass(frozen=True)
class Encoder:
    """``plain`` turns text into ids without adding any; ``bos`` is the token added before a text, None without one.

    Added and special tokens inside a text become their ids, as in transformers. ``decode`` writes them out again and
    skips ids without a token, those of rows of the embedding beyond the vocabulary. ``special`` are the ids of special
    tokens, which are not part of a text.
    """

    plain: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int | None
    special: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text, BOS before it where the tokenizer adds one."""
        return ([] if self.bos is None else [self.bos]) + self.plain(text)


def read_encoder(checkpoint: Checkpoint) -> Encoder:
    """The tokenizer of a checkpoint of either kind. Raises ``TokenizerError`` when it has none that can be run."""
    path = checkpoint.path
    with library_errors(path), quiet_stderr():
        read = _from_gguf(path, checkpoint.metadata) if checkpoint.kind == "gguf" else _from_directory(path)
        read.decode(read.plain(_PROBE))

    def plain(text: str) -> list[int]:
        if lone := re.search("[\ud800-\udfff]", text):
            raise TokenizerError(
                "the text is not valid Unicode",
                found=f"{lone[0]!a} at character {lone.start()}",
                expected="text without halves of surrogate pairs, as Python reads bytes that are not UTF-8",
                fix="give the text in UTF-8",
            )
        with library_errors(path, "the tokenizer cannot encode the text"):
            return read.plain(text)

    def decode(ids: Sequence[int]) -> str:
        with library_errors(path, "the tokenizer cannot decode the tokens"):
            return read.decode(ids)

    return replace(read, plain=plain, decode=decode)


def _from_directory(directory: Path) -> Encoder:
    file = tokenizer_file(directory)
    if file.name != "tokenizer.json":
        files = read_sentencepiece_files(file)
        texts = {token: text for token, (text, _) in files.known.items()}
        plain, decode = sentencepiece_codec(
            files.model,
            texts,
            files.added.tokens,
            space_once=files.space_once,
            split_special=files.config.splits_special,
        )
        return Encoder(plain, decode, files.bos, _special(files.added.tokens))
    tokenizer, before = _tokenizer_json(file)
    if len(before) > 1:
        raise TokenizerError(
            "the tokenizer adds several tokens before a text",
            where=file,
            found=repr_short(before),
            expected="at most one, BOS",
            fix="correct the post_processor in tokenizer.json",
        )
    bos = before[0] if before else None
    if bos is not None and tokenizer.id_to_token(bos) is None:
        raise TokenizerError(
            "the tokenizer's post-processor adds a token that the vocabulary does not have",
            where=file,
            found=f"id {bos}",
            fix="fetch tokenizer.json again",
        )
    return _huggingface(tokenizer, bos)


def _tokenizer_json(file: Path) -> tuple[Any, list[int]]:
    """The library's tokenizer with all tokens that the directory adds, and the ids that it adds before a text.

    Truncation and padding belong to a call of the library; a file has them where they were switched on when it was
    saved.
    """
    tokenizer, parsed = _loaded(file) or _parsed(file)
    check_pipeline(parsed, file)
    before, _ = tokens_around(parsed, file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # of training: it would draw other tokens each time
    tokenizer.encode_special_tokens = read_tokenizer_config(file.parent).splits_special
    return tokenizer, before


Read = tuple[
    Any, Mapping[str, Any]
]  # the library's tokenizer with all added tokens, and its JSON but for the model


def _loaded(file: Path) -> Read | None:
    """A tokenizer.json as the library reads it, without the JSON of its model; None where that is not sufficient."""
    from tokenizers import Tokenizer

    raw = read_tokenizer_bytes(file)
    parsed = json_without_model(raw, file)
    if parsed is None:
        return None
    try:
        with library_errors(file):
            tokenizer = Tokenizer.from_buffer(raw)
    except TokenizerError:  # parsing it gives a better error
        return None
    config = read_tokenizer_config(file.parent)
    added = read_added_tokens(config, BaseVocabulary.of_tokenizer(tokenizer), file, tokenizer=parsed).tokens
    if {one.content for one in tokenizer.get_added_tokens_decoder().values()} - {one.text for one in added}:
        return None  # a key that only the library recognised, by escapes
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        step = getattr(tokenizer, part)
        parsed[part] = None if step is None else json.loads(step.__getstate__())
    return (tokenizer, parsed) if _adds(tokenizer, added) else None


def _parsed(file: Path) -> Read:
    """A tokenizer.json that is parsed completely, so that each token gets its id from the files."""
    from tokenizers import Tokenizer

    read = read_tokenizer_json(file)
    parsed, added = read.parsed, read.added.tokens
    tokenizer = Tokenizer.from_buffer(read.raw)
    if not _adds(tokenizer, added):
        # The library numbers added tokens on; those of the model's own vocabulary keep their ids.
        vocab = read.base | {one.text: one.token for one in added}
        tokenizer = Tokenizer.from_str(
            json.dumps(parsed | {"model": parsed["model"] | {"vocab": vocab}, "added_tokens": []})
        )
        tokenizer.add_tokens([to_library_token(one) for one in added])
    return tokenizer, parsed


def _adds(tokenizer: Any, added: Sequence[AddedToken]) -> bool:
    """Add tokens, and tell whether each of them then has its id."""
    tokenizer.add_tokens([to_library_token(one) for one in added])
    return all(tokenizer.token_to_id(one.text) == one.token for one in added)


def _huggingface(tokenizer: Any, bos: int | None) -> Encoder:
    return Encoder(
        # Of the library's ways to encode, the one that lets other threads run and keeps no offsets.
        plain=lambda text: list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
        bos=bos,
        special=frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        ),
    )


def _special(added: Sequence[AddedToken]) -> frozenset[int]:
    return frozenset(one.token for one in added if one.special)


def _from_gguf(path: Path, values: Mapping[str, GgufValue]) -> Encoder:
    vocabulary = read_gguf_vocabulary(path, values)
    if vocabulary is None:
        raise TokenizerError(
            "the file has no vocabulary",
            where=path,
            found="tokenizer.ggml.model = none",
            fix="give the original's directory as --tokenizer",
        )
    bos = vocabulary.token_around("bos")
    if vocabulary.model == "gpt2":
        return _huggingface(build_bpe_tokenizer(path, vocabulary), bos)
    found = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    typed = [
        (token, text, kind)
        for token, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if not is_filler(token, text, kind)
    ]
    added = [
        AddedToken(token, text, special=kind != TokenType.USER_DEFINED)
        for token, text, kind in typed
        if kind in found
    ]
    plain, decode = sentencepiece_codec(
        build_sentencepiece_model(vocabulary),
        {token: text for token, text, _ in typed},
        added,
        space_once=vocabulary.space_prefix_once,
    )
    return Encoder(plain, decode, bos, _special(added))
