"""The vocabulary inside a GGUF, every value checked for its type, its length and its range."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, TokenType

from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.errors import TokenizerError, join_names, repr_short
from bamba_quant.tokenizers.llama_rules import llama_defaults, overridden_types
from bamba_quant.tokenizers.vocabulary import ID_KEYS, SPACE_PREFIX_ONCE_KEY, Vocabulary

# The types that llama.cpp takes (llama-vocab.cpp).
_INT32 = frozenset({GGUFValueType.INT32})
_UINT32 = frozenset({GGUFValueType.UINT32})
_SCORES = frozenset({GGUFValueType.FLOAT32, GGUFValueType.INT32})
_BYTES = frozenset({GGUFValueType.UINT8, GGUFValueType.INT8})
_STRING = frozenset({GGUFValueType.STRING})
_BOOL = frozenset({GGUFValueType.BOOL})
_TYPES = frozenset(int(kind) for kind in TokenType)
# The models that can be run, and the lists that each consists of besides the tokens and their types.
_LISTS = {"gpt2": (Keys.Tokenizer.MERGES,), "llama": (Keys.Tokenizer.SCORES,), "t5": (Keys.Tokenizer.SCORES,)}


def read_gguf_vocabulary(
    path: Path, values: Mapping[str, GgufValue], fix: str = "give the original's directory as --tokenizer"
) -> Vocabulary | None:
    """The vocabulary in the key-values of a file, None where it has none.

    ``path`` and ``fix`` are for messages. Raises ``TokenizerError`` for a kind of vocabulary that only llama.cpp can
    run and for values that are missing, of another type, or contradict each other.
    """
    read = _Reader(path, values, fix)
    model = read.scalar(Keys.Tokenizer.MODEL, _STRING, "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in _LISTS:
        raise TokenizerError(
            "the file has no vocabulary that can be run",
            where=path,
            found=f"tokenizer.ggml.model = {repr_short(model)}",
            expected=", ".join(_LISTS),
            fix=fix,
        )
    tokens = read.array(Keys.Tokenizer.LIST, _STRING)
    types = read.array(Keys.Tokenizer.TOKEN_TYPE, _INT32)
    if types is None and tokens is not None and model == "gpt2":
        # As in llama.cpp. SentencePiece cannot run without knowing which pieces are bytes and which is unknown.
        types = [int(TokenType.NORMAL)] * len(tokens)
    more = {key: read.array(key, _kinds(key)) for key in _LISTS[model]}
    parallel = {Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: types, **more}
    missing = [key for key, found in parallel.items() if found is None]
    lengths = {key: len(found) for key, found in parallel.items() if found is not None}
    merges = more.get(Keys.Tokenizer.MERGES)
    lengths.pop(Keys.Tokenizer.MERGES, None)
    if tokens is None or types is None or missing or len(set(lengths.values())) > 1:
        raise TokenizerError(
            "the file's vocabulary is not whole",
            where=path,
            found=f"no {join_names(missing)}" if missing else lengths,
            expected="one entry a token in each of its lists",
            fix=fix,
        )
    scores = more.get(Keys.Tokenizer.SCORES)
    read.each(Keys.Tokenizer.TOKEN_TYPE, types, lambda kind: kind in _TYPES, "a token type from 1 to 6")
    if scores is not None:
        read.each(Keys.Tokenizer.SCORES, scores, math.isfinite, "a finite number")
    if merges is not None:
        # As in llama.cpp the first character may be a space itself.
        read.each(
            Keys.Tokenizer.MERGES, merges, lambda merge: merge.find(" ", 1) > 0, "two parts and a space"
        )
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise read.error("the vocabulary has one text under two ids", repr_short(twice), "each text once")
    pre = read.scalar(Keys.Tokenizer.PRE, _STRING, "default")
    flags = {
        name: read.scalar(key, _BOOL)
        for name, key in (
            ("add_bos", Keys.Tokenizer.ADD_BOS),
            ("add_eos", Keys.Tokenizer.ADD_EOS),
            ("add_space_prefix", Keys.Tokenizer.ADD_PREFIX),
            ("remove_extra_whitespaces", Keys.Tokenizer.REMOVE_EXTRA_WS),
        )
    }
    special, notes = read.ids(len(tokens), llama_defaults(model, pre).ids)
    charsmap = read.array(Keys.Tokenizer.PRECOMPILED_CHARSMAP, _BYTES) or []
    vocabulary = Vocabulary(
        model=model,
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=None if scores is None else tuple(scores),
        merges=None if merges is None else tuple(merges),
        special_ids=special,
        charsmap=bytes(byte & 0xFF for byte in charsmap),
        chat_templates=read.templates(),
        notes=notes,
        space_prefix_once=bool(read.scalar(SPACE_PREFIX_ONCE_KEY, _BOOL)),
        **flags,
    )
    ids = {text: token for token, text in enumerate(tokens)}
    return replace(vocabulary, types=overridden_types(types, ids, vocabulary.all_special))


def _kinds(key: str) -> frozenset[GGUFValueType]:
    return _STRING if key == Keys.Tokenizer.MERGES else _SCORES


class _Reader:
    """Typed access to the key-values of a file."""

    def __init__(self, path: Path, values: Mapping[str, GgufValue], fix: str) -> None:
        self.path, self.values, self.fix = path, values, fix

    def error(self, what: str, found: object, expected: str) -> TokenizerError:
        return TokenizerError(what, where=self.path, found=found, expected=expected, fix=self.fix)

    def scalar(self, key: str, kinds: frozenset[GGUFValueType], default: Any = None) -> Any:
        """The value under ``key``. Raises ``TokenizerError`` for one of another type."""
        value = self.values.get(key)
        if value is None:
            return default
        if value.type not in kinds:
            raise self._type(key, value, _names(kinds))
        return value.value

    def array(self, key: str, kinds: frozenset[GGUFValueType]) -> list[Any] | None:
        """The list under ``key``. Raises ``TokenizerError`` for a value that is not an array of ``kinds``."""
        value = self.values.get(key)
        if value is None:
            return None
        if value.type != GGUFValueType.ARRAY or value.item not in kinds:
            raise self._type(key, value, f"an array of {_names(kinds)}")
        return list(value.value)

    def each(self, key: str, values: list[Any], right: Callable[[Any], bool], expected: str) -> None:
        """Raise ``TokenizerError`` for the first of ``values`` that is not ``right``."""
        for index, value in enumerate(values):
            if not right(value):
                raise self.error(f"{key} has a wrong entry", f"{repr_short(value)} at {index}", expected)

    def ids(self, count: int, defaults: Mapping[str, int]) -> tuple[dict[str, int], tuple[str, ...]]:
        """The special tokens by kind, and notes on ids out of range, which llama.cpp leaves out as well."""
        found, notes = {}, []
        for kind, key in ID_KEYS.items():
            token = self.scalar(key, _UINT32)
            if token is None:
                continue
            if token < count:
                found[kind] = token
                continue
            default = defaults.get(kind)
            instead = f"llama.cpp's default {default} counts" if default is not None else "none is used"
            notes.append(
                f"{key} = {token} is not in the vocabulary of {count} tokens; {instead}, as in llama.cpp"
            )
        return found, tuple(notes)

    def templates(self) -> dict[str, str]:
        """The chat templates by name, the usual one under "default"."""
        named = self.array(Keys.Tokenizer.CHAT_TEMPLATES, _STRING) or []
        keys = {"default": Keys.Tokenizer.CHAT_TEMPLATE}
        keys |= {
            name: Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name) for name in named if name != "default"
        }
        found = {name: self.scalar(key, _STRING) for name, key in keys.items()}
        return {name: text for name, text in found.items() if text is not None}

    def _type(self, key: str, value: GgufValue, expected: str) -> TokenizerError:
        item = "" if value.item is None else f" of {value.item.name}"
        return self.error(
            f"{key} has a value of the wrong type",
            f"{value.type.name}{item}: {repr_short(value.value)}",
            expected,
        )


def _names(kinds: frozenset[GGUFValueType]) -> str:
    return " or ".join(sorted(kind.name for kind in kinds))
