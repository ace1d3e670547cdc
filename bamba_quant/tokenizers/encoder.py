"""Text to token ids and back, by the tokenizer of a Hugging Face directory or by the vocabulary inside a GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import Keys

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.checkpoint.json_file import optional
from bamba_quant.errors import BambaQuantError, TokenizerError
from bamba_quant.tokenizers.files import tokenizer_config, tokenizer_file
from bamba_quant.tokenizers.rebuilt import byte_level_bpe, model_proto, reader


@dataclass(frozen=True)
class Encoder:
    """``plain`` turns text into ids without adding any; ``bos`` is the token put before a text, if one is.

    ``decode`` passes over ids that have no token, as rows of an embedding beyond the vocabulary have.
    """

    plain: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text, BOS before it where the tokenizer adds one."""
        return ([] if self.bos is None else [self.bos]) + self.plain(text)


def read_encoder(checkpoint: Checkpoint) -> Encoder:
    """The tokenizer of a checkpoint of either kind. Raises ``TokenizerError`` when it has none that can be run."""
    try:
        if checkpoint.kind == "gguf":
            return _from_gguf(checkpoint.path, checkpoint.metadata)
        return _from_directory(checkpoint.path)
    except BambaQuantError:
        raise
    # The tokenizers and sentencepiece libraries raise whatever they like for a vocabulary they cannot run.
    except Exception as error:
        raise TokenizerError(
            "the tokenizer cannot be run",
            where=checkpoint.path,
            found=str(error) or type(error).__name__,
            fix="fetch the tokenizer's files again",
        ) from error


def _from_directory(directory: Path) -> Encoder:
    file = tokenizer_file(directory)
    if file.name != "tokenizer.json":
        add_bos = optional(tokenizer_config(directory), "add_bos_token", bool, directory, TokenizerError)
        return _sentencepiece(file.read_bytes(), add_bos)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return _huggingface(tokenizer, whole[0] if whole[1 : 1 + len(plain)] == plain else None)


def _huggingface(tokenizer: Any, bos: int | None) -> Encoder:
    return Encoder(
        # Of the library's ways to encode, the one that lets other threads run and keeps no offsets.
        plain=lambda text: list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        bos=bos,
    )


def _sentencepiece(model: bytes, add_bos: bool | None) -> Encoder:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    bos, count = int(processor.bos_id()), int(processor.get_piece_size())
    return Encoder(
        plain=lambda text: list(processor.encode(text)),
        decode=lambda ids: str(processor.decode([token for token in ids if token < count])),
        bos=bos if bos >= 0 and add_bos is not False else None,
    )


def _from_gguf(path: Path, values: Mapping[str, Value]) -> Encoder:
    read = reader(values)
    kind = read(Keys.Tokenizer.MODEL)
    if kind == "gpt2":
        bos = read(Keys.Tokenizer.BOS_ID) if read(Keys.Tokenizer.ADD_BOS, False) else None
        return _huggingface(byte_level_bpe(path, read), bos)
    if kind in ("llama", "t5"):
        return _sentencepiece(model_proto(kind, read), read(Keys.Tokenizer.ADD_BOS))
    raise TokenizerError(
        "the file has no vocabulary that can be run",
        where=path,
        found=f"tokenizer.ggml.model = {kind!r}",
        expected="gpt2, llama or t5",
        fix="give the original's directory as --tokenizer",
    )
