"""A GGUF's vocabulary as the files a model directory keeps it in, for transformers and for conversion back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.errors import TokenizerError, listed
from bamba_quant.tokenizers.rebuilt import Read, byte_level_bpe, model_proto, reader

_FIX = "leave the tokenizer out with --no-vocab, and copy the original's files into the directory"
_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
# transformers' classes for the two kinds of SentencePiece models.
_SENTENCEPIECE_CLASSES = {"llama": "LlamaTokenizer", "t5": "T5Tokenizer"}


def tokenizer_files(
    path: Path, values: Mapping[str, Value], max_length: int
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Contents by file name, and notes; no files where there is no vocabulary ("none" or no key at all).

    ``path`` is only for messages. Raises ``TokenizerError`` for a vocabulary that cannot be rebuilt.
    """
    read = reader(values)
    kind = read(Keys.Tokenizer.MODEL, "none")
    if kind == "none":
        return {}, ("the file has no vocabulary, so no tokenizer is written",)
    _check_lists(path, kind, read)
    notes: tuple[str, ...] = ()
    if kind == "gpt2":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(path, read, max_length)}
        files = {"tokenizer.json": _tokenizer_json(path, read)}
    elif kind in _SENTENCEPIECE_CLASSES:
        settings = {"tokenizer_class": _SENTENCEPIECE_CLASSES[kind], **_settings(path, read, max_length)}
        settings |= _sentencepiece_settings(kind, read)
        files = {"tokenizer.model": model_proto(kind, read)}
        if kind == "t5" and (read(Keys.Tokenizer.ADD_BOS, False) or not read(Keys.Tokenizer.ADD_EOS, False)):
            notes = (
                "transformers' T5Tokenizer puts EOS behind every text and no BOS before it, whatever the file "
                "says; the pieces are the same",
            )
    else:
        raise TokenizerError(
            "the file's vocabulary cannot be written as a tokenizer",
            where=path,
            found=f"tokenizer.ggml.model = {kind!r}",
            expected="gpt2, llama or t5",
            fix=_FIX,
        )
    return {**files, "tokenizer_config.json": as_json(path, settings)}, notes


def generation_config(path: Path, values: Mapping[str, Value]) -> dict[str, bytes]:
    """generation_config.json by its name: where to begin, all tokens to stop at, and padding; none without ids."""
    read = reader(values)
    stops = [
        read(key)
        for key in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
        if read(key) is not None
    ]
    stops = list(dict.fromkeys(stops))
    ids = {
        "bos_token_id": read(Keys.Tokenizer.BOS_ID),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": read(Keys.Tokenizer.PAD_ID),
    }
    kept = {key: token for key, token in ids.items() if token is not None}
    return {"generation_config.json": as_json(path, kept)} if kept else {}


def as_json(path: Path, value: Mapping[str, Any]) -> bytes:
    """JSON as model directories have it. Raises ``TokenizerError`` for text that is no UTF-8."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the file holds text that is no UTF-8, which JSON cannot carry",
            where=path,
            found=repr(error.object[max(0, error.start - 8) : error.end + 8]),
            fix=_FIX,
        ) from error


def _check_lists(path: Path, kind: str, read: Read) -> None:
    """Raise ``TokenizerError`` where what a kind of vocabulary consists of is missing or of unequal length."""
    parallel = {Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE} if kind == "gpt2" else set()
    if kind in _SENTENCEPIECE_CLASSES:
        parallel = {Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.SCORES}
    needed = parallel | ({Keys.Tokenizer.MERGES} if kind == "gpt2" else set())
    missing = sorted(key for key in needed if not isinstance(read(key), list))
    lengths = {key: len(read(key)) for key in sorted(parallel - set(missing))}
    if missing or len(set(lengths.values())) > 1:
        raise TokenizerError(
            "the file's vocabulary is not whole",
            where=path,
            found=f"no {listed(missing)}" if missing else lengths,
            expected="one entry a token in each of its lists",
            fix=_FIX,
        )


def _settings(path: Path, read: Read, max_length: int) -> dict[str, Any]:
    tokens = read(Keys.Tokenizer.LIST)
    settings: dict[str, Any] = {}
    for kind, key in _ID_KEYS.items():
        token = read(key)
        if token is None:
            continue
        if not 0 <= token < len(tokens):
            raise TokenizerError(
                f"the {kind} token is not in the vocabulary",
                where=path,
                found=f"id {token}",
                expected=f"an id under {len(tokens)}",
                fix=_FIX,
            )
        settings[f"{kind}_token"] = tokens[token]
    for kind, key in (("bos", Keys.Tokenizer.ADD_BOS), ("eos", Keys.Tokenizer.ADD_EOS)):
        if read(key) is not None:
            settings[f"add_{kind}_token"] = bool(read(key)) and f"{kind}_token" in settings
    templates = _templates(read)
    if templates:
        settings["chat_template"] = templates
    return settings | {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }


def _templates(read: Read) -> str | list[dict[str, str]] | None:
    """The one template, or all of them by name as transformers lists several."""
    default = read(Keys.Tokenizer.CHAT_TEMPLATE)
    named = {
        name: read(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name))
        for name in read(Keys.Tokenizer.CHAT_TEMPLATES, [])
    }
    if not named:
        return default if default is None else str(default)
    if default is not None:
        named = {"default": default, **named}
    return [{"name": name, "template": text} for name, text in named.items() if text is not None]


def _sentencepiece_settings(kind: str, read: Read) -> dict[str, Any]:
    """Tokens that transformers must find in a text itself: SentencePiece never matches a control token there."""
    settings: dict[str, Any] = {
        "added_tokens_decoder": {
            str(token): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": found == TokenType.CONTROL,
            }
            for token, (text, found) in enumerate(
                zip(read(Keys.Tokenizer.LIST), read(Keys.Tokenizer.TOKEN_TYPE), strict=True)
            )
            if found in (TokenType.CONTROL, TokenType.USER_DEFINED)
        }
    }
    if kind == "llama":
        settings |= {"legacy": False, "add_prefix_space": bool(read(Keys.Tokenizer.ADD_PREFIX, True))}
    else:
        # T5's sentinel tokens would otherwise be made up.
        settings |= {"extra_ids": 0}
    return settings


def _tokenizer_json(path: Path, read: Read) -> bytes:
    """tokenizer.json: its post-processor adds BOS before and EOS after a text where the file says so."""
    from tokenizers import processors

    try:
        tokenizer = byte_level_bpe(path, read, fix=_FIX)
        tokens = read(Keys.Tokenizer.LIST)
        added = {
            kind: read(key)
            for kind, key, flag in (
                ("bos", Keys.Tokenizer.BOS_ID, Keys.Tokenizer.ADD_BOS),
                ("eos", Keys.Tokenizer.EOS_ID, Keys.Tokenizer.ADD_EOS),
            )
            if read(flag, False) and read(key) is not None
        }
        steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
        if added:
            before, after = ([tokens[added[kind]]] if kind in added else [] for kind in ("bos", "eos"))
            steps.append(
                processors.TemplateProcessing(
                    single=[*before, "$A", *after],
                    pair=[*before, "$A", *after, *before, "$B", *after],
                    special_tokens=[(tokens[token], token) for token in added.values()],
                )
            )
        tokenizer.post_processor = processors.Sequence(steps)
        return f"{tokenizer.to_str(pretty=True)}\n".encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            "the vocabulary holds tokens that are no UTF-8",
            where=path,
            found=repr(error.object[:40]),
            fix=_FIX,
        ) from error
