"""The vocabulary inside a GGUF as a tokenizer again, one that makes the tokens the original made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.pretokenizers import PRETOKENIZERS, PreTokenizer, find_pretokenizer
from bamba_quant.tokenizers.vocabulary import Vocabulary, is_filler

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto


def _pretokenizer_row(path: Path, vocabulary: Vocabulary, fix: str) -> PreTokenizer:
    """The table's row for a file's pre-tokenizer. Raises ``TokenizerError`` for one that only llama.cpp knows."""
    row = find_pretokenizer(vocabulary.pre)
    if row is None:
        raise TokenizerError(
            "the file's pre-tokenizer is known to llama.cpp alone",
            where=path,
            found=repr(vocabulary.pre[:80]),
            expected=", ".join(sorted({row.name for row in PRETOKENIZERS})),
            fix=fix,
        )
    return row


def build_bpe_tokenizer(
    path: Path, vocabulary: Vocabulary, fix: str = "give the original's directory as --tokenizer"
) -> Any:
    """A ``tokenizers.Tokenizer`` from tokens, types and merges; the splitting is the table's for the file's name.

    Rows of the embedding that have no token get none.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    row = _pretokenizer_row(path, vocabulary, fix)
    build: dict[str, Callable[..., Any]] = {
        "Split": lambda pattern, behaviour: pre_tokenizers.Split(Regex(pattern), behaviour.lower()),
        "Punctuation": lambda behaviour: pre_tokenizers.Punctuation(behaviour.lower()),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    }
    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    base = {text: token for token, (text, kind) in enumerate(typed) if not is_filler(token, text, kind)}
    cuts = ((merge, merge.find(" ", 1)) for merge in vocabulary.merges or ())
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    tokenizer = Tokenizer(models.BPE(base, merges, ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([build[kind](*rest) for kind, *rest in row.steps])
    tokenizer.decoder = decoders.ByteLevel()
    for kinds, add in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), tokenizer.add_special_tokens),
        ((TokenType.USER_DEFINED,), tokenizer.add_tokens),
    ):
        add([AddedToken(text, normalized=False) for text, kind in typed if kind in kinds])
    return tokenizer


def build_sentencepiece_model(vocabulary: Vocabulary) -> Any:
    """A SentencePiece ModelProto with the file's pieces, scores and types, which are SentencePiece's own numbers.

    It ends at the last piece that is a token; fillers between tokens stay, unused, since a piece's place is its id.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    tokens, types, scores = vocabulary.tokens, vocabulary.types, vocabulary.scores or ()
    count = len(tokens)
    while count and is_filler(count - 1, tokens[count - 1], types[count - 1]):
        count -= 1
    for text, score, piece_type in list(zip(tokens, scores, types, strict=True))[:count]:
        model.pieces.add(piece=text, score=score, type=piece_type)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _BPE if vocabulary.model == "llama" else _UNIGRAM
    trainer.vocab_size = count
    trainer.byte_fallback = int(TokenType.BYTE) in types
    for name in ("bos", "eos", "unk", "pad"):
        known = vocabulary.special(name) if name == "unk" else vocabulary.special_ids.get(name)
        token = -1 if known is None else known
        setattr(trainer, f"{name}_id", token)
        if 0 <= token < count:
            # The library finds these by their text, not by their id.
            setattr(trainer, f"{name}_piece", tokens[token])
    normalizer.name = "identity" if vocabulary.model == "llama" else "nmt_nfkc"
    normalizer.add_dummy_prefix = vocabulary.prefixes_space
    normalizer.remove_extra_whitespaces = bool(vocabulary.remove_extra_whitespaces)
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = vocabulary.charsmap
    return model
