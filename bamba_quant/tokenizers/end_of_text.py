"""The tokens at which a text ends: a directory's by transformers' rule, a GGUF's by llama.cpp's."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.errors import TokenizerError
from bamba_quant.files.json_file import read_json
from bamba_quant.files.regular_file import lexists
from bamba_quant.tokenizers.added_tokens import LARGEST_ID
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from bamba_quant.tokenizers.llama_overrides import end_of_generation_tokens
from bamba_quant.tokenizers.vocabulary import Vocabulary


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text; none where nothing says it."""
    if checkpoint.kind != "gguf":
        return tuple(directory_stop_tokens(checkpoint.path)[1])
    vocabulary = read_gguf_vocabulary(checkpoint.path, checkpoint.metadata)
    return () if vocabulary is None else llama_stop_tokens(vocabulary)


def directory_stop_tokens(directory: Path) -> tuple[str, list[int]]:
    """``eos_token_id`` and the file that has it: generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        values = read_json(file, "the model's settings") if lexists(file) else {}
        if values.get("eos_token_id") is not None:
            return name, token_ids(values, "eos_token_id", file)
    return "", []


def token_ids(values: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """One id or a list of them without repetitions; -1 says that there is none."""
    listed = values.get(key)
    tokens = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and -1 <= token <= LARGEST_ID for token in tokens):
        raise TokenizerError(
            f"{key} is not a token id",
            where=file,
            found=reprlib.repr(listed),
            expected="an id, or a list of ids",
        )
    return list(dict.fromkeys(token for token in tokens if token >= 0))


def llama_stop_tokens(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokens for which llama.cpp's ``llama_vocab_is_eog`` is true, smallest first."""
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    return tuple(sorted(end_of_generation_tokens(ids, vocabulary.all_special)))
