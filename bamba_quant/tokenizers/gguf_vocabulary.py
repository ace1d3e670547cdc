"""The vocabulary inside a GGUF, every value checked for its type, its length and its range."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gguf import GGUFValueType, Keys, TokenType

from bamba_quant.checkpoint.gguf_values import GgufValue, KeyValues
from bamba_quant.errors import CheckpointError, TokenizerError, join_names, repr_short
from bamba_quant.tokenizers.llama_rules import llama_defaults, overridden_types
from bamba_quant.tokenizers.vocabulary import FLAG_KEYS, ID_KEYS, SPACE_PREFIX_ONCE_KEY, Vocabulary

# The models that can be run, and the list that each has besides the tokens and their types.
_LISTS = {"gpt2": Keys.Tokenizer.MERGES, "llama": Keys.Tokenizer.SCORES, "t5": Keys.Tokenizer.SCORES}
_BYTES = (GGUFValueType.UINT8, GGUFValueType.INT8)


def read_gguf_vocabulary(
    path: Path, values: Mapping[str, GgufValue], fix: str = "give the original's directory as --tokenizer"
) -> Vocabulary | None:
    """The vocabulary in the key-values of a file, None where it has none.

    ``path`` and ``fix`` are for messages. Raises ``TokenizerError`` for a kind of vocabulary that only llama.cpp can
    run and for values that are missing, of another type than llama.cpp takes (llama-vocab.cpp), or contradict each
    other.
    """
    try:
        return _read(KeyValues(dict(values), path))
    except CheckpointError as error:
        raise TokenizerError(
            error.what, where=path, found=error.found, expected=error.expected, fix=fix
        ) from error


def _read(values: KeyValues) -> Vocabulary | None:
    model = values.text(Keys.Tokenizer.MODEL)
    if model in (None, "none", "no_vocab"):
        return None
    if model not in _LISTS:
        raise CheckpointError(
            "this kind of vocabulary is not supported",
            found=f"tokenizer.ggml.model = {repr_short(model)}",
            expected=", ".join(_LISTS),
        )
    tokens = values.texts(Keys.Tokenizer.LIST)
    types = values.integers(Keys.Tokenizer.TOKEN_TYPE, least=1, most=6, kinds=(GGUFValueType.INT32,))
    if types is None and tokens is not None and model == "gpt2":
        # As in llama.cpp. SentencePiece cannot run without knowing which pieces are bytes and which is unknown.
        types = [int(TokenType.NORMAL)] * len(tokens)
    scores = values.numbers(Keys.Tokenizer.SCORES) if model != "gpt2" else None
    # As in llama.cpp the first character of a merge may be a space itself.
    two_parts = ("two parts and a space", lambda merge: merge.find(" ", 1) > 0)
    merges = values.texts(Keys.Tokenizer.MERGES, two_parts) if model == "gpt2" else None
    lists = {
        Keys.Tokenizer.LIST: tokens,
        Keys.Tokenizer.TOKEN_TYPE: types,
        _LISTS[model]: merges if model == "gpt2" else scores,
    }
    missing = [key for key, found in lists.items() if found is None]
    lengths = {key: len(found) for key, found in lists.items() if found is not None and found is not merges}
    if tokens is None or types is None or missing or len(set(lengths.values())) > 1:
        raise CheckpointError(
            "the file's vocabulary is incomplete",
            found=f"no {join_names(missing)}" if missing else lengths,
            expected="one entry for each token in each of its lists",
        )
    ids = {text: token for token, text in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(
            "the vocabulary has one text under two ids", found=repr_short(twice), expected="each text once"
        )
    pre = values.text(Keys.Tokenizer.PRE)
    pre = "default" if pre is None else pre
    special, notes = _special_ids(values, len(tokens), llama_defaults(model, pre).ids)
    charsmap = values.integers(Keys.Tokenizer.PRECOMPILED_CHARSMAP, least=-128, most=255, kinds=_BYTES) or []
    vocabulary = Vocabulary(
        model=model,
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=None if scores is None else tuple(scores),
        merges=None if merges is None else tuple(merges),
        special_ids=special,
        charsmap=bytes(byte & 0xFF for byte in charsmap),
        chat_templates=_templates(values),
        notes=notes,
        space_prefix_once=bool(values.flag(SPACE_PREFIX_ONCE_KEY)),
        **{name: values.flag(key) for name, key in FLAG_KEYS.items()},
    )
    return replace(vocabulary, types=overridden_types(types, ids, vocabulary.all_special))


def _special_ids(
    values: KeyValues, count: int, defaults: Mapping[str, int]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The special tokens by kind, and notes on ids out of range, which llama.cpp leaves out as well."""
    found, notes = {}, []
    for kind, key in ID_KEYS.items():
        token = values.integer(key)
        if token is not None and token < count:
            found[kind] = token
        elif token is not None:
            default = defaults.get(kind)
            instead = f"llama.cpp's default {default} counts" if default is not None else "none is used"
            notes.append(
                f"{key} = {token} is not in the vocabulary of {count} tokens; {instead}, as in llama.cpp"
            )
    return found, tuple(notes)


def _templates(values: KeyValues) -> dict[str, str]:
    """The chat templates by name, the usual one under "default"."""
    keys = {"default": Keys.Tokenizer.CHAT_TEMPLATE}
    for name in values.texts(Keys.Tokenizer.CHAT_TEMPLATES) or []:
        keys.setdefault(name, Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name))
    found = {name: values.text(key) for name, key in keys.items()}
    return {name: text for name, text in found.items() if text is not None}
