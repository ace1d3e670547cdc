"""The tokens at which a text ends: a directory's by transformers' rule, a GGUF's by llama.cpp's."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.json_file import read_json
from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.added_tokens import LARGEST_ID
from bamba_quant.tokenizers.gguf_vocabulary import read_gguf
from bamba_quant.tokenizers.vocabulary import Vocabulary

# llama.cpp finds these by their text, whatever a file says of them (src/llama-vocab.cpp, special_eog_ids).
ENDING_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[".split()
)
# Tokens for filling in the middle that end a text too; the first that is there counts, unless a key names one.
FILL_IN_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text; none where nothing says it."""
    if checkpoint.kind != "gguf":
        return tuple(directory_stops(checkpoint.path)[1])
    vocabulary = read_gguf(checkpoint.path, checkpoint.metadata)
    return () if vocabulary is None else llama_stop_tokens(vocabulary)


def directory_stops(directory: Path) -> tuple[str, list[int]]:
    """``eos_token_id`` and the file that has it: generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        values = read_json(file, "the model's settings") if file.is_file() else {}
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
    """The tokens for which llama.cpp's ``llama_vocab_is_eog`` is true, smallest first.

    Of several tokens for filling in the middle llama.cpp takes any one; here it is the first of the table.
    """
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    found = {ids[text] for text in ENDING_TEXTS if text in ids}
    for kind, texts in FILL_IN_TEXTS.items():
        named = vocabulary.special_ids.get(kind)
        by_text = next((ids[text] for text in texts if text in ids), None)
        found |= {token for token in (named if named is not None else by_text,) if token is not None}
    found |= {token for kind in ("eos", "eot", "eom") if (token := vocabulary.special(kind)) is not None}
    ending = {vocabulary.tokens[token] for token in found}
    calls = ending & {"<|call|>", "<|calls|>"}
    if calls and ending & {"<|return|>", "<|flush|>"} and "<|end|>" in ending:
        found.discard(ids["<|end|>"])  # there it ends a message, not the text
    if ending & {"<|tool_response>", "<|plamo:eos|>"} and "</s>" in ending:
        found.discard(ids["</s>"])  # there it is a normal token
    return tuple(sorted(found))
