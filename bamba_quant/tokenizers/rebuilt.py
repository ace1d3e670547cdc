"""The vocabulary inside a GGUF as a tokenizer again, one that makes the tokens the original made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.pretokenizers import TABLE, PreTokenizer

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
Read = Callable[..., Any]


def reader(values: Mapping[str, Value]) -> Read:
    """``read(key, default=None)``: a GGUF's value in plain Python."""

    def read(key: str, default: Any = None) -> Any:
        return values[key].value if key in values else default

    return read


def is_filler(token: int, text: str, kind: int) -> bool:
    """Whether an entry stands for a row of the embedding that has no token (``vocabulary.laid_out``)."""
    return kind == TokenType.UNUSED and text == f"[PAD{token}]"


def splitting(path: Path, read: Read, fix: str) -> PreTokenizer:
    """The table's row for a file's pre-tokenizer. Raises ``TokenizerError`` for one that only llama.cpp knows."""
    name = read(Keys.Tokenizer.PRE)
    row = next((row for row in TABLE if row.name == name), None)
    if row is None:
        raise TokenizerError(
            "the file's pre-tokenizer is known to llama.cpp alone",
            where=path,
            found=name,
            expected=", ".join(sorted({row.name for row in TABLE})),
            fix=fix,
        )
    return row


def byte_level_bpe(path: Path, read: Read, fix: str = "give the original's directory as --tokenizer") -> Any:
    """A ``tokenizers.Tokenizer`` from tokens, types and merges; the splitting is the table's for the file's name.

    Rows of the embedding that have no token get none.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    row = splitting(path, read, fix)
    build: dict[str, Callable[..., Any]] = {
        "Split": lambda pattern, behaviour: pre_tokenizers.Split(Regex(pattern), behaviour.lower()),
        "Punctuation": lambda behaviour: pre_tokenizers.Punctuation(behaviour.lower()),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    }
    tokens, types = read(Keys.Tokenizer.LIST), read(Keys.Tokenizer.TOKEN_TYPE)
    vocabulary = {
        text: token
        for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if not is_filler(token, text, kind)
    }
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


def model_proto(kind: str, read: Read) -> bytes:
    """A SentencePiece model with the file's pieces, scores and types, which are SentencePiece's own numbers.

    It ends at the last piece that is a token; fillers between tokens stay, unused, since a piece's place is its id.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    tokens = read(Keys.Tokenizer.LIST)
    scores = read(Keys.Tokenizer.SCORES)
    types = read(Keys.Tokenizer.TOKEN_TYPE)
    count = len(tokens)
    while count and is_filler(count - 1, tokens[count - 1], types[count - 1]):
        count -= 1
    for text, score, piece_type in list(zip(tokens, scores, types, strict=True))[:count]:
        model.pieces.add(piece=text, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _BPE if kind == "llama" else _UNIGRAM
    trainer.vocab_size = count
    trainer.byte_fallback = int(TokenType.BYTE) in types
    for name, key in (
        ("bos", Keys.Tokenizer.BOS_ID),
        ("eos", Keys.Tokenizer.EOS_ID),
        ("unk", Keys.Tokenizer.UNK_ID),
        ("pad", Keys.Tokenizer.PAD_ID),
    ):
        token = read(key, -1)
        setattr(trainer, f"{name}_id", token)
        if 0 <= token < count:
            # The library finds these by their text, not by their id.
            setattr(trainer, f"{name}_piece", tokens[token])
    normalizer.name = "identity" if kind == "llama" else "nmt_nfkc"
    normalizer.add_dummy_prefix = read(Keys.Tokenizer.ADD_PREFIX, True)
    normalizer.remove_extra_whitespaces = read(Keys.Tokenizer.REMOVE_EXTRA_WS, False)
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = bytes(read(Keys.Tokenizer.PRECOMPILED_CHARSMAP, b""))
    return bytes(model.SerializeToString())
