"""Text to token ids and back, by the tokenizer of a Hugging Face directory or by the vocabulary inside a GGUF."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.checkpoint.json_file import optional
from bamba_quant.errors import BambaQuantError, TokenizerError
from bamba_quant.tokenizers.files import tokenizer_config, tokenizer_file
from bamba_quant.tokenizers.pretokenizers import TABLE

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto


@dataclass(frozen=True)
class Encoder:
    """``plain`` turns text into ids without adding any; ``bos`` is the token put before a text, if one is."""

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
    if file.name == "tokenizer.model":
        add_bos = optional(tokenizer_config(directory), "add_bos_token", bool, directory, TokenizerError)
        return _sentencepiece(file.read_bytes(), add_bos)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    plain, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return _huggingface(tokenizer, whole[0] if whole[1 : 1 + len(plain)] == plain else None)


def _huggingface(tokenizer: Any, bos: int | None) -> Encoder:
    return Encoder(
        plain=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        bos=bos,
    )


def _sentencepiece(model: bytes, add_bos: bool | None) -> Encoder:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    bos = int(processor.bos_id())
    return Encoder(
        plain=lambda text: list(processor.encode(text)),
        decode=lambda ids: str(processor.decode(list(ids))),
        bos=bos if bos >= 0 and add_bos is not False else None,
    )


def _from_gguf(path: Path, values: Mapping[str, Value]) -> Encoder:
    def read(key: str, default: Any = None) -> Any:
        return values[key].value if key in values else default

    kind = read(Keys.Tokenizer.MODEL)
    if kind == "gpt2":
        bos = read(Keys.Tokenizer.BOS_ID) if read(Keys.Tokenizer.ADD_BOS, False) else None
        return _huggingface(_byte_level_bpe(path, read), bos)
    if kind in ("llama", "t5"):
        return _sentencepiece(_model_proto(kind, read), read(Keys.Tokenizer.ADD_BOS))
    raise TokenizerError(
        "the file has no vocabulary that can be run",
        where=path,
        found=f"tokenizer.ggml.model = {kind!r}",
        expected="gpt2, llama or t5",
        fix="give the original's directory as --tokenizer",
    )


def _byte_level_bpe(path: Path, read: Callable[..., Any]) -> Any:
    """A ``tokenizers.Tokenizer`` from tokens, types and merges; the splitting is the table's for the file's name."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    name = read(Keys.Tokenizer.PRE)
    row = next((row for row in TABLE if row.name == name), None)
    if row is None:
        raise TokenizerError(
            "the file's pre-tokenizer is known to llama.cpp alone",
            where=path,
            found=name,
            expected=", ".join(sorted({row.name for row in TABLE})),
            fix="give the original's directory as --tokenizer",
        )
    build: dict[str, Callable[..., Any]] = {
        "Split": lambda pattern, behaviour: pre_tokenizers.Split(Regex(pattern), behaviour.lower()),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    }
    tokens, types = read(Keys.Tokenizer.LIST), read(Keys.Tokenizer.TOKEN_TYPE)
    vocabulary = {text: token for token, text in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in read(Keys.Tokenizer.MERGES)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([build[kind](*rest) for kind, *rest in row.steps])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(text, normalized=False)
                for text, found in zip(tokens, types, strict=True)
                if found == kind
            ]
        )
    return tokenizer


def _model_proto(kind: str, read: Callable[..., Any]) -> bytes:
    """A SentencePiece model with the file's pieces, scores and types, which are SentencePiece's own numbers."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    scores = read(Keys.Tokenizer.SCORES)
    types = read(Keys.Tokenizer.TOKEN_TYPE)
    for text, score, piece_type in zip(read(Keys.Tokenizer.LIST), scores, types, strict=True):
        model.pieces.add(piece=text, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _BPE if kind == "llama" else _UNIGRAM
    trainer.byte_fallback = int(TokenType.BYTE) in types
    for name, key in (
        ("bos_id", Keys.Tokenizer.BOS_ID),
        ("eos_id", Keys.Tokenizer.EOS_ID),
        ("unk_id", Keys.Tokenizer.UNK_ID),
        ("pad_id", Keys.Tokenizer.PAD_ID),
    ):
        setattr(trainer, name, read(key, -1))
    normalizer.add_dummy_prefix = read(Keys.Tokenizer.ADD_PREFIX, True)
    normalizer.remove_extra_whitespaces = read(Keys.Tokenizer.REMOVE_EXTRA_WS, False)
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = bytes(read(Keys.Tokenizer.PRECOMPILED_CHARSMAP, b""))
    return bytes(model.SerializeToString())
