"""A SentencePiece tokenizer.model, BPE or unigram, with the settings llama.cpp follows and errors for the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from bamba_quant.errors import TokenizerError, repr_short
from bamba_quant.files.reading import read_bytes
from bamba_quant.tokenizers.added_tokens import (
    AddedToken,
    AddedTokens,
    BaseVocabulary,
    llama_cpp_differences,
    read_added_tokens,
)
from bamba_quant.tokenizers.library_guard import first_line
from bamba_quant.tokenizers.settings import TokenizerConfig, read_tokenizer_config
from bamba_quant.tokenizers.special_tokens import chat_templates, special_id, special_ids
from bamba_quant.tokenizers.vocabulary import BPE, UNIGRAM, Vocabulary, fill_embedding_rows, two_ids_error

_INSIDE = frozenset(
    {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
)  # found in a text before it is encoded
# Models of 256,000 pieces have 5 MB. A piece takes two bytes at least, and some 60 once it is parsed.
_MODEL_BYTES = 16 << 20
_ADDED_SCORE = -1000.0  # llama.cpp's score for tokens that no merge makes


@dataclass(frozen=True)
class SentencePieceFiles:
    """A tokenizer.model with all that its directory adds.

    ``model`` is the ModelProto, in which added tokens have replaced pieces with their ids. ``space_once`` is true
    where transformers adds the leading space before a whole text only, not after each added token.
    """

    file: Path
    model: Any
    config: TokenizerConfig
    added: AddedTokens
    space_once: bool

    @property
    def unigram(self) -> bool:
        return bool(self.model.trainer_spec.model_type == UNIGRAM)

    @property
    def add_bos(self) -> bool:
        """Whether BOS is added before a text, by default where the model has one.

        This is the default of llama.cpp and of transformers 4, with which these models were published. Transformers 5
        documents it for LlamaTokenizer too, but its code adds none (TokenizersBackend, ``_add_bos_token``).
        """
        flag = self.config.flag("add_bos_token")
        return "bos" in self.own_ids if flag is None else flag

    @property
    def bos(self) -> int | None:
        """The token before a text. Raises ``TokenizerError`` where one is to be added and there is none."""
        if not self.add_bos:
            return None
        ids = {text: token for token, (text, _) in self.known.items()}
        token = special_id(self.config, "bos", ids, self.own_ids)
        if token is None:
            raise TokenizerError(
                "the tokenizer adds BOS to a text, but has no BOS token",
                where=self.file.parent,
                found="add_bos_token is true, without a bos_token and without one in the model",
                fix="name bos_token in tokenizer_config.json, or set add_bos_token to false",
            )
        return token

    @property
    def add_eos(self) -> bool:
        return bool(self.config.flag("add_eos_token"))

    @property
    def own_ids(self) -> dict[str, int]:
        """The special tokens that the model itself names."""
        trainer = self.model.trainer_spec
        own = {kind: int(getattr(trainer, f"{kind}_id")) for kind in ("bos", "eos", "unk", "pad")}
        return {kind: token for kind, token in own.items() if 0 <= token < len(self.model.pieces)}

    @property
    def known(self) -> dict[int, tuple[str, int]]:
        """Text and GGUF's type of each token. Piece types of SentencePiece and token types are the same numbers."""
        known = {token: (piece.piece, int(piece.type)) for token, piece in enumerate(self.model.pieces)}
        for one in self.added.tokens:
            text, kind = known.get(one.token, ("", int(TokenType.NORMAL)))
            if kind not in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE) or text != one.text:
                known[one.token] = (one.text, int(one.type))
        return known


def read_sentencepiece_files(file: Path) -> SentencePieceFiles:
    """Read ``file`` and the files beside it. Raises a ``BambaQuantError`` for ids and tokens that contradict."""
    model = _parsed(file)
    config = read_tokenizer_config(file.parent)
    base: dict[str, int] = {}
    for token, piece in enumerate(model.pieces):
        if base.setdefault(piece.piece, token) != token:
            raise two_ids_error(piece.piece, base[piece.piece], token, file)
    added = read_added_tokens(config, BaseVocabulary.of_vocab(base), file, renames=True)
    # transformers cuts the model's own control and user-defined pieces out of a text, too.
    listed = {one.text for one in added.tokens}
    renamed = {one.token for one in added.tokens}
    own = [
        AddedToken(token, piece.piece, special=piece.type != TokenType.USER_DEFINED)
        for token, piece in enumerate(model.pieces)
        if piece.type in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        and piece.piece not in listed
        and token not in renamed
    ]
    tokens = tuple(sorted((*added.tokens, *own), key=lambda one: one.token))
    for one in added.tokens:
        if one.token < len(model.pieces) and model.pieces[one.token].piece != one.text:
            model.pieces[one.token].piece = one.text
            model.pieces[one.token].type = int(one.type)
    prefix = config.flag("add_prefix_space")
    if prefix is not None:
        model.normalizer_spec.add_dummy_prefix = prefix
    once = (
        model.trainer_spec.model_type != UNIGRAM
        and bool(model.normalizer_spec.add_dummy_prefix)
        and not config.flag("legacy")
    )
    return SentencePieceFiles(file, model, config, AddedTokens(tokens, added.notes), once)


def read_sentencepiece(file: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of ``file`` (a tokenizer.model) for an embedding of ``vocab_size`` rows.

    Raises ``TokenizerError`` for a model that llama.cpp would not follow.
    """
    read = read_sentencepiece_files(file)
    model, config, unigram = read.model, read.config, read.unigram
    _check(file, model)
    known = read.known
    tokens, types = fill_embedding_rows(known, vocab_size, file)
    scores = [piece.score for piece in model.pieces]
    scores += [_ADDED_SCORE] * (vocab_size - len(scores))
    ids = {text: token for token, (text, _) in known.items()}
    special, special_notes = special_ids(config, vocab_size, ids, read.own_ids)
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    return Vocabulary(
        model="t5" if unigram else "llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=tuple(scores[:vocab_size]),
        special_ids=special,
        add_bos=read.bos is not None,
        add_eos=read.add_eos,
        add_space_prefix=prefix,
        remove_extra_whitespaces=bool(model.normalizer_spec.remove_extra_whitespaces) if unigram else None,
        charsmap=model.normalizer_spec.precompiled_charsmap if unigram else b"",
        chat_templates=chat_templates(config),
        notes=(
            *_notes(tokens, types, special.values(), read.space_once),
            *_bos_note(read),
            *read.added.notes,
            *llama_cpp_differences(read.added.tokens, config),
            *special_notes,
        ),
        space_prefix_once=read.space_once,
    )


def _bos_note(read: SentencePieceFiles) -> tuple[str, ...]:
    if read.add_bos and read.config.flag("add_bos_token") is None:
        return (
            "tokenizer_config.json does not say add_bos_token; BOS is added, as in llama.cpp and transformers 4, while "
            "transformers 5 adds none for some classes of tokenizers",
        )
    return ()


def _notes(
    tokens: tuple[str, ...], types: tuple[int, ...], special: Iterable[int], space_once: bool
) -> tuple[str, ...]:
    """Notes on tokens in the middle of a text, where llama.cpp differs from transformers or from sentencepiece."""
    notes = []
    inside = {token for token, kind in enumerate(types) if kind in _INSIDE}.difference(special)
    if space_once and inside:
        notes.append(
            f"llama.cpp puts the leading space also behind added tokens inside a text ({len(inside)} tokens, the "
            f"first {repr_short(tokens[min(inside)])}); transformers does not"
        )
    spaced = [
        tokens[token]
        for token in sorted(inside)
        if types[token] == TokenType.USER_DEFINED and (" " in tokens[token] or "▁" in tokens[token])
    ]
    if spaced:
        notes.append(
            f"{len(spaced)} user-defined tokens (the first {repr_short(spaced[0])}) hold a space, which "
            "llama.cpp and the sentencepiece library look for in different spellings: texts with them are "
            "tokenized differently there"
        )
    return tuple(notes)


def _parsed(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    raw = read_bytes(file, "a SentencePiece model", _MODEL_BYTES)
    try:
        model.ParseFromString(raw)
    except DecodeError as error:
        raise _damaged(file, first_line(str(error))) from error
    # A piece that is not UTF-8 comes as bytes.
    sound = (
        isinstance(each.piece, str) and each.piece and math.isfinite(each.score) for each in model.pieces
    )
    if not model.pieces:
        raise _damaged(file, "no pieces")
    if not all(sound):
        raise _damaged(file, "a piece without text or with a score that is not finite")
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(model.trainer_spec, f"{kind}_id")
        if token >= len(model.pieces):
            raise TokenizerError(
                f"a tokenizer.model names a {kind} token that it does not have",
                where=file,
                found=f"{kind}_id = {token}",
                expected=f"an id under {len(model.pieces)}, or -1",
                fix="fetch tokenizer.model again",
            )
    return model


def _damaged(file: Path, found: str) -> TokenizerError:
    return TokenizerError(
        "a tokenizer.model is damaged: the tokenizer cannot be run",
        where=file,
        found=found,
        expected="a SentencePiece model",
        fix="fetch tokenizer.model again",
    )


def _check(file: Path, model: Any) -> None:
    """Raise ``TokenizerError`` for the first setting of the model that llama.cpp does not follow."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    unigram, bpe = trainer.model_type == UNIGRAM, trainer.model_type == BPE
    for wrong, what, found, expected in (
        (
            not (unigram or bpe),
            "llama.cpp has no tokenizer for this kind of SentencePiece model",
            f"model_type {trainer.model_type}",
            "BPE or unigram",
        ),
        (
            trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
            "the SentencePiece model treats white space as llama.cpp cannot",
            "treat_whitespace_as_suffix or no escape_whitespaces",
            "spaces written as a leading ▁",
        ),
        (
            unigram and trainer.byte_fallback,
            "llama.cpp's unigram tokenizer has no byte fallback",
            "a unigram model with byte_fallback",
            "BPE with, or unigram without",
        ),
        (
            bpe and (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces),
            "the SentencePiece model normalizes text and llama.cpp's BPE tokenizer does not",
            f"normalizer {repr_short(normalizer.name)}, remove_extra_whitespaces = "
            f"{normalizer.remove_extra_whitespaces}",
            "normalizer 'identity' without remove_extra_whitespaces",
        ),
        (
            bpe and not trainer.byte_fallback,
            "the SentencePiece model has no byte pieces, without which llama.cpp stops at the first unknown character",
            None,
            "a model trained with byte_fallback",
        ),
    ):
        if wrong:
            raise TokenizerError(what, where=file, found=found, expected=expected)
