"""A vocabulary as GGUF stores it, whichever tokenizer it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import GGUFValueType, Keys, TokenType

from bamba_quant.checkpoint.gguf_values import GgufValue, array, boolean, string, uint32
from bamba_quant.errors import TokenizerError, repr_short
from bamba_quant.tokenizers.llama_rules import LlamaDefaults, llama_defaults

# GGUF's names of special tokens by the name transformers gives them ("seperator" is GGUF's spelling).
ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "fim_pre": Keys.Tokenizer.FIM_PRE_ID,
    "fim_suf": Keys.Tokenizer.FIM_SUF_ID,
    "fim_mid": Keys.Tokenizer.FIM_MID_ID,
    "fim_pad": Keys.Tokenizer.FIM_PAD_ID,
    "fim_rep": Keys.Tokenizer.FIM_REP_ID,
    "fim_sep": Keys.Tokenizer.FIM_SEP_ID,
}
# GGUF's keys of the flags of a ``Vocabulary``.
FLAG_KEYS = {
    "add_bos": Keys.Tokenizer.ADD_BOS,
    "add_eos": Keys.Tokenizer.ADD_EOS,
    "add_space_prefix": Keys.Tokenizer.ADD_PREFIX,
    "remove_extra_whitespaces": Keys.Tokenizer.REMOVE_EXTRA_WS,
}
# True where a SentencePiece vocabulary adds its leading space before a whole text only, as transformers does. GGUF
# has no key for it, and llama.cpp also adds it after every added token.
SPACE_PREFIX_ONCE_KEY = "bamba_quant.tokenizer.space_prefix_once"
LARGEST_ID = 2**31 - 1  # ids are 32-bit integers in llama.cpp
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
_MOST_ROWS = 2**21  # no model has more tokens; a damaged number would make billions of names for unused rows


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, and how text becomes tokens.

    ``model`` is ggml's tokenizer: "gpt2" (byte-level BPE with ``merges`` and the pre-tokenizer ``pre``), "llama"
    (SentencePiece BPE with ``scores``) or "t5" (SentencePiece unigram with ``scores``). ``notes`` are the
    tool's own decisions. ``add_bos`` and the other flags are None where a file does not have them.
    ``space_prefix_once``: see ``SPACE_PREFIX_ONCE_KEY``.
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
    space_prefix_once: bool = False

    @property
    def defaults(self) -> LlamaDefaults:
        """llama.cpp's defaults for what this vocabulary leaves open."""
        return llama_defaults(self.model, self.pre)

    @property
    def all_special(self) -> dict[str, int]:
        """Ids of special tokens: this vocabulary's, else llama.cpp's defaults where there is such a token."""
        ids = {**self.defaults.ids, **self.special_ids}
        return {kind: token for kind, token in ids.items() if token < len(self.tokens)}

    def special(self, kind: str) -> int | None:
        """The id of a special token; see ``all_special``."""
        return self.all_special.get(kind)

    def token_around(self, kind: str) -> int | None:
        """The token that is added to a text: ``kind`` "bos" before it, "eos" after it.

        Raises ``TokenizerError`` where one is to be added and there is none; llama.cpp aborts then.
        """
        flag = self.add_bos if kind == "bos" else self.add_eos
        adds = flag if flag is not None else getattr(self.defaults, f"add_{kind}")
        token = self.special(kind) if adds else None
        if adds and token is None:
            raise TokenizerError(
                f"the vocabulary adds {kind.upper()} to a text, but has no such token",
                found=f"add_{kind}_token is true, and no {kind}_token_id",
                fix=f"set tokenizer.ggml.{kind}_token_id, or tokenizer.ggml.add_{kind}_token to false",
            )
        return token

    @property
    def prefixes_space(self) -> bool:
        flag = self.add_space_prefix
        return self.defaults.add_space_prefix if flag is None else flag

    def metadata(self) -> dict[str, GgufValue]:
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
            values[ID_KEYS[kind]] = uint32(token)
        flags = {key: getattr(self, name) for name, key in FLAG_KEYS.items()}
        values |= {key: boolean(flag) for key, flag in flags.items() if flag is not None}
        if self.charsmap:
            values[Keys.Tokenizer.PRECOMPILED_CHARSMAP] = array(GGUFValueType.UINT8, self.charsmap)
        if self.space_prefix_once:
            values[SPACE_PREFIX_ONCE_KEY] = boolean(True)
        return values | self._chat_metadata()

    def _chat_metadata(self) -> dict[str, GgufValue]:
        values: dict[str, GgufValue] = {}
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        if named:
            values[Keys.Tokenizer.CHAT_TEMPLATES] = array(GGUFValueType.STRING, sorted(named))
        for name, text in named.items():
            values[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)] = string(text)
        if "default" in self.chat_templates:
            values[Keys.Tokenizer.CHAT_TEMPLATE] = string(self.chat_templates["default"])
        return values


def fill_embedding_rows(
    known: Mapping[int, tuple[str, int]], vocab_size: int, where: object
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and types for ids 0 to ``vocab_size`` - 1: rows of the embedding without a token become unused ones.

    ``known`` maps an id to its text and type. Raises ``TokenizerError`` for an id that the embedding has no row for,
    and for a text under two ids, with which llama.cpp aborts (llama-vocab.cpp asserts that tokens differ).
    """
    if vocab_size > _MOST_ROWS:
        raise TokenizerError(
            "vocab_size is larger than any vocabulary",
            where=where,
            found=f"vocab_size = {vocab_size}",
            expected=f"at most {_MOST_ROWS}",
            fix="correct vocab_size in config.json",
        )
    outside = [token for token in known if not 0 <= token < vocab_size]
    if outside:
        raise TokenizerError(
            "the tokenizer has tokens that the embedding has no row for",
            where=where,
            found=f"{len(outside)} tokens, the first {repr_short(known[min(outside)][0])} with id {min(outside)}",
            expected=f"ids under vocab_size = {vocab_size}",
            fix="take the tokenizer that the model was trained with, or enlarge the embedding",
        )
    ids: dict[str, int] = {}
    for token, (text, _) in known.items():
        other = ids.setdefault(text, token)
        if other != token:
            raise two_ids_error(text, other, token, where)
    filled = [known.get(token) or (_unused(token, ids), int(TokenType.UNUSED)) for token in range(vocab_size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled)


def _unused(token: int, taken: Mapping[str, int]) -> str:
    """llama.cpp's name for a row without a token, or the next one that no token has."""
    name = f"[PAD{token}]"
    while name in taken:
        name = f"[{name}]"
    return name


def is_filler(token: int, text: str, kind: int) -> bool:
    """Whether an entry is the filler of a row of the embedding without a token (``fill_embedding_rows``)."""
    return kind == TokenType.UNUSED and text == f"[PAD{token}]"


def two_ids_error(text: str, one: int, other: int, where: object) -> TokenizerError:
    """The error for one text under two ids."""
    found = f"{repr_short(text)} as {one} and as {other}"
    return _contradiction("the tokenizer has one text under two ids", found, where)


def two_texts_error(
    token: int, one: str, other: str, where: object, what: str = "the tokenizer has two texts under one id"
) -> TokenizerError:
    """The error for two texts under one id."""
    return _contradiction(what, f"id {token} is {repr_short(one)} and {repr_short(other)}", where)


def _contradiction(what: str, found: str, where: object) -> TokenizerError:
    return TokenizerError(
        what,
        where=where,
        found=found,
        expected="one text for each id and one id for each text",
        fix="take all files from one version of the tokenizer",
    )
