"""A vocabulary as GGUF stores it, whichever tokenizer it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import GGUFValueType, Keys, TokenType

from bamba_quant.checkpoint.gguf_values import Value, array, boolean, string, uint32
from bamba_quant.errors import TokenizerError

# GGUF's names of special tokens by the name transformers gives them ("seperator" is GGUF's spelling).
_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, and how text becomes tokens.

    ``model`` is ggml's tokenizer: "gpt2" (byte-level BPE with ``merges`` and the pre-tokenizer ``pre``), "llama"
    (SentencePiece BPE with ``scores``) or "t5" (SentencePiece unigram with ``scores``). ``notes`` say what the
    tool decided on its own.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Value]:
        """Every ``tokenizer.*`` key, in the order llama.cpp's converter writes them."""
        values = {
            Keys.Tokenizer.MODEL: string(self.model),
            Keys.Tokenizer.PRE: string(self.pre),
            Keys.Tokenizer.LIST: array(GGUFValueType.STRING, self.tokens),
        }
        if self.scores is not None:
            values[Keys.Tokenizer.SCORES] = array(GGUFValueType.FLOAT32, self.scores)
        values[Keys.Tokenizer.TOKEN_TYPE] = array(GGUFValueType.INT32, self.types)
        if self.merges is not None:
            values[Keys.Tokenizer.MERGES] = array(GGUFValueType.STRING, self.merges)
        for kind, token in self.special_ids.items():
            values[_ID_KEYS[kind]] = uint32(token)
        flags = (
            (Keys.Tokenizer.ADD_BOS, self.add_bos),
            (Keys.Tokenizer.ADD_EOS, self.add_eos),
            (Keys.Tokenizer.ADD_PREFIX, self.add_space_prefix),
            (Keys.Tokenizer.REMOVE_EXTRA_WS, self.remove_extra_whitespaces),
        )
        values |= {key: boolean(flag) for key, flag in flags if flag is not None}
        if self.charsmap:
            values[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = array(GGUFValueType.UINT8, self.charsmap)
        return values | self._chat_metadata()

    def _chat_metadata(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        if named:
            values[Keys.Tokenizer.CHAT_TEMPLATES] = array(GGUFValueType.STRING, sorted(named))
        for name, text in named.items():
            values[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)] = string(text)
        if "default" in self.chat_templates:
            values[Keys.Tokenizer.CHAT_TEMPLATE] = string(self.chat_templates["default"])
        return values


def laid_out(
    known: Mapping[int, tuple[str, int]], vocab_size: int, where: object
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and types for ids 0 to ``vocab_size`` - 1: rows of the embedding without a token become unused ones.

    ``known`` maps an id to its text and type. Raises ``TokenizerError`` for an id that the embedding has no row for,
    and for a text under two ids, with which llama.cpp aborts (llama-vocab.cpp asserts that tokens differ).
    """
    outside = [token for token in known if not 0 <= token < vocab_size]
    if outside:
        raise TokenizerError(
            "the tokenizer has tokens that the embedding has no row for",
            where=where,
            found=f"{len(outside)} tokens, the first {known[min(outside)][0]!r} with id {min(outside)}",
            expected=f"ids under vocab_size = {vocab_size}",
            fix="take the tokenizer that the model was trained with, or enlarge the embedding",
        )
    ids: dict[str, int] = {}
    for token, (text, _) in known.items():
        other = ids.setdefault(text, token)
        if other != token:
            raise TokenizerError(
                "the tokenizer has one text under two ids",
                where=where,
                found=f"{text!r} as {other} and as {token}",
                expected="each text once",
                fix="correct the added tokens",
            )
    filled = [known.get(token) or (_unused(token, ids), int(TokenType.UNUSED)) for token in range(vocab_size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled)


def _unused(token: int, taken: Mapping[str, int]) -> str:
    """llama.cpp's name for a row without a token, or the next one that no token has."""
    name = f"[PAD{token}]"
    while name in taken:
        name = f"[{name}]"
    return name
