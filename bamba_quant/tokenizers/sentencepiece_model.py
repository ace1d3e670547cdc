"""A SentencePiece tokenizer.model, BPE or unigram, with the settings llama.cpp follows and errors for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.checkpoint.json_file import optional
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.files import Added, added_tokens, tokenizer_config
from bamba_quant.tokenizers.special_tokens import chat_templates, special_ids
from bamba_quant.tokenizers.vocabulary import Vocabulary, laid_out

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
_ADDED_SCORE = -1000.0  # llama.cpp's score for tokens that no merge makes


def read_sentencepiece(file: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of ``file`` (a tokenizer.model) for an embedding of ``vocab_size`` rows.

    Piece types of SentencePiece and token types of GGUF are the same numbers. Raises ``TokenizerError`` for a
    model that llama.cpp would not follow.
    """
    model = _parsed(file)
    unigram = model.trainer_spec.model_type == _UNIGRAM
    _check(file, model)
    known: dict[int, tuple[str, int]] = {
        token: (piece.piece, int(piece.type)) for token, piece in enumerate(model.pieces)
    }
    scores = [piece.score for piece in model.pieces]
    settings = tokenizer_config(file.parent)
    for added in added_tokens(file.parent, settings):
        if known.get(added.token) != (added.text, int(TokenType.CONTROL)):
            known[added.token] = (added.text, _type_of(added))
    tokens, types = laid_out(known, vocab_size, file)
    scores += [_ADDED_SCORE] * (vocab_size - len(scores))
    ids = {text: token for token, (text, _) in known.items()}
    own = {kind: int(getattr(model.trainer_spec, f"{kind}_id")) for kind in ("bos", "eos", "unk", "pad")}
    own = {kind: token for kind, token in own.items() if 0 <= token < vocab_size}
    special, special_notes = special_ids(file.parent, settings, vocab_size, ids.get, own)
    add_bos, add_eos = (
        optional(settings, f"add_{kind}_token", bool, file.parent / "tokenizer_config.json", TokenizerError)
        for kind in ("bos", "eos")
    )
    return Vocabulary(
        model="t5" if unigram else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=tuple(scores[:vocab_size]),
        special_ids=special,
        # transformers' Llama tokenizers add BOS and no EOS unless told otherwise.
        add_bos="bos" in special if add_bos is None else add_bos,
        add_eos=bool(add_eos),
        add_space_prefix=bool(model.normalizer_spec.add_dummy_prefix),
        remove_extra_whitespaces=bool(model.normalizer_spec.remove_extra_whitespaces) if unigram else None,
        charsmap=model.normalizer_spec.precompiled_charsmap if unigram else b"",
        chat_templates=chat_templates(file.parent, settings),
        notes=_notes(tokens, types, bool(model.normalizer_spec.add_dummy_prefix)) + special_notes,
    )


def _notes(tokens: tuple[str, ...], types: tuple[int, ...], add_dummy_prefix: bool) -> tuple[str, ...]:
    user_defined = [
        text for text, kind in zip(tokens, types, strict=True) if kind == int(TokenType.USER_DEFINED)
    ]
    notes = []
    if add_dummy_prefix and user_defined:
        notes.append(
            "llama.cpp puts the leading space also behind user-defined tokens inside a text; the sentencepiece "
            "library does not"
        )
    spaced = [text for text in user_defined if " " in text or "▁" in text]
    if spaced:
        notes.append(
            f"{len(spaced)} user-defined tokens (the first {spaced[0]!r}) hold a space, which llama.cpp and the "
            "sentencepiece library look for in different spellings: texts with them are tokenized differently there"
        )
    return tuple(notes)


def _type_of(added: Added) -> int:
    if added.text == "<unk>":
        return int(TokenType.UNKNOWN)
    return int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)


def _parsed(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise TokenizerError(
            "a tokenizer.model cannot be read", where=file, found=str(error), expected="a SentencePiece model"
        ) from error
    if not model.pieces:
        raise TokenizerError(
            "a tokenizer.model holds no pieces", where=file, expected="a SentencePiece model"
        )
    return model


def _check(file: Path, model: Any) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(
            "llama.cpp has no tokenizer for this kind of SentencePiece model",
            where=file,
            found=f"model_type {trainer.model_type}",
            expected="BPE or unigram",
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise TokenizerError(
            "the SentencePiece model treats white space as llama.cpp cannot",
            where=file,
            found="treat_whitespace_as_suffix or no escape_whitespaces",
            expected="spaces written as a leading ▁",
        )
    if trainer.model_type == _UNIGRAM:
        if trainer.byte_fallback:
            raise TokenizerError(
                "llama.cpp's unigram tokenizer has no byte fallback",
                where=file,
                found="a unigram model with byte_fallback",
                expected="BPE with, or unigram without",
            )
        return
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise TokenizerError(
            "the SentencePiece model normalizes text and llama.cpp's BPE tokenizer does not",
            where=file,
            found=f"normalizer {normalizer.name!r}, remove_extra_whitespaces = "
            f"{normalizer.remove_extra_whitespaces}",
            expected="normalizer 'identity' without remove_extra_whitespaces",
        )
    if not trainer.byte_fallback:
        raise TokenizerError(
            "the SentencePiece model has no byte pieces, without which llama.cpp stops at the "
            "first unknown character",
            where=file,
            expected="a model trained with byte_fallback",
        )
