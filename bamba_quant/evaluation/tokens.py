"""Tokenize the text once for all models, check that their tokenizers agree, and cut it as llama-perplexity does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint import Checkpoint, open_checkpoint
from bamba_quant.errors import CheckpointError
from bamba_quant.evaluation.logits_file import LogitsFile
from bamba_quant.evaluation.models import ComparisonError, OpenedModel, tokenizer_hash
from bamba_quant.evaluation.provenance import Text
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_quant.inference.loading import read_text
from bamba_quant.tokenizers.encoder import Encoder, read_encoder
from bamba_reference.packing import InputError
from bamba_reference.runtime.perplexity import cut_chunks

# Texts that are encoded together: each needs some hundred bytes a token.
_ENCODERS = 2
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class TokenizedText:
    """The chunks of the text, int64 (n, ctx): ``own`` has its own tokens, ``cut`` BOS at the first position of each."""

    own: NDArray[np.int64]
    cut: NDArray[np.int64]
    text: Text

    @property
    def first(self) -> int:
        """The first position in a chunk whose logits are scored."""
        return self.text.ctx // 2

    @property
    def targets(self) -> NDArray[np.int64]:
        """The scored tokens (n, scored)."""
        return self.cut[:, self.first + 1 :]


def text_tokens(
    opened: Sequence[OpenedModel], text: Path | None, options: EvaluationOptions
) -> TokenizedText:
    """Tokenize ``text`` with the base's tokenizer. Raises ``ComparisonError`` if a candidate's gives other tokens."""
    if text is None:
        raise CheckpointError("no text to evaluate on", fix="give one with --text")
    words, digest = read_text(text)
    checkpoints = [each.model.checkpoint for each in opened]
    if options.tokenizer:
        checkpoints = [open_checkpoint(options.tokenizer, weights=False)]
    keys = [_tokenizer_key(each) for each in checkpoints]
    distinct = dict(zip(keys, checkpoints, strict=True))
    with ThreadPoolExecutor(_ENCODERS) as pool:
        encoded = dict(zip(distinct, pool.map(partial(_encoded, words), distinct.values()), strict=True))
    (encoder, ids), *others = (encoded[key] for key in keys)
    for other, (theirs, found) in zip(opened[1:], others, strict=False):
        _check_same_tokens(encoder, ids, theirs, found, other.path)
    own, cut = _cut(ids, encoder.bos, opened, options)
    return TokenizedText(
        own, cut, _text(text.name, digest, len(ids), own, encoder.bos, tokenizer_hash(checkpoints[0]))
    )


def _tokenizer_key(checkpoint: Checkpoint) -> object:
    """Equal for checkpoints whose tokenizers are the same files, or the same key-values of a GGUF."""
    if checkpoint.kind == "gguf":
        return tokenizer_hash(checkpoint)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in checkpoint.path.glob(pattern)})
    return tuple(
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files if file.is_file()
    )


def _encoded(words: str, checkpoint: Checkpoint) -> tuple[Encoder, list[int]]:
    encoder = read_encoder(checkpoint)
    return encoder, encoder.encode(words)


def _check_same_tokens(
    encoder: Encoder, ids: list[int], theirs: Encoder, found: list[int], path: Path
) -> None:
    if found == ids and theirs.bos == encoder.bos:
        return
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found))
    )
    raise ComparisonError(
        "a candidate's tokenizer produces other tokens than the base's",
        where=f"{path}, first difference at token {place}",
        found=f"{len(found)} tokens, {found[place : place + 4]} there; BOS id {theirs.bos}",
        expected=f"{len(ids)} tokens, {ids[place : place + 4]} there; BOS id {encoder.bos}",
        fix="compare files that were made from the same model, or use one tokenizer for all with --tokenizer",
    )


def file_tokens(
    given: LogitsFile, opened: Sequence[OpenedModel], text: Path | None, options: EvaluationOptions
) -> TokenizedText:
    """The tokens of a file of logits, which must be the text's where one is given too."""
    for each in opened:
        if each.model.config.vocab_size != given.vocab_size:
            raise ComparisonError(
                "a candidate has another vocabulary than the file of logits",
                where=each.path,
                found=f"{each.model.config.vocab_size} tokens",
                expected=f"{given.vocab_size} tokens",
                fix="make the file of logits with the base of this candidate",
            )
    if options.chunks is not None and options.chunks < 1:
        raise InputError(
            "the number of chunks is too small", where="--chunks", found=options.chunks, expected="at least 1"
        )
    if options.ctx not in (given.ctx, EvaluationOptions.ctx):
        raise ComparisonError(
            "the file of logits has chunks of another length",
            where=given.path,
            found=f"{given.ctx} tokens",
            expected=f"{options.ctx}, as --ctx says",
            fix="leave out --ctx, or make the file again",
        )
    checkpoint = (
        open_checkpoint(options.tokenizer, weights=False) if options.tokenizer else opened[0].model.checkpoint
    )
    encoder = read_encoder(checkpoint)
    own = given.tokens[: options.chunks].astype(np.int64)
    name, digest, count = given.path.name, "", given.tokens.size
    if text is not None:
        words, digest = read_text(text)
        ids = encoder.encode(words)
        if ids[: own.size] != own.ravel().tolist():
            raise ComparisonError(
                "the file of logits was made from another text, or with another tokenizer",
                where=given.path,
                fix="give its own text, or none",
            )
        name, count = text.name, len(ids)
    cut = own.copy()
    if encoder.bos is not None:
        cut[:, 0] = encoder.bos
    return TokenizedText(own, cut, _text(name, digest, count, own, encoder.bos, tokenizer_hash(checkpoint)))


def _cut(
    ids: list[int], bos: int | None, opened: Sequence[OpenedModel], options: EvaluationOptions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    vocab_size = opened[0].model.config.vocab_size
    cut = cut_chunks(ids, vocab_size=vocab_size, ctx=options.ctx, bos=bos, chunks=options.chunks)
    return np.asarray(ids[: cut.size], np.int64).reshape(cut.shape), cut


def _text(
    name: str, digest: str, count: int, own: NDArray[np.int64], bos: int | None, tokenizer: str
) -> Text:
    chunks, ctx = own.shape
    return Text(name, digest, count, ctx, chunks, chunks * (ctx - 1 - ctx // 2), bos, tokenizer)
