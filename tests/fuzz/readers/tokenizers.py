"""Readers of a tokenizer: tokenizer.json, SentencePiece models, the settings and templates beside them."""

from __future__ import annotations

from functools import partial

from tests.fuzz import calls
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.json_text import json_text
from tests.fuzz.mutations.protobuf import sentencepiece
from tests.fuzz.mutations.text import plain_text
from tests.fuzz.registry import Case, reader
from tests.fuzz.runner import tried
from tests.fuzz.seeds import models, tokenizers
from tests.fuzz.tree import Tree

# What says how large the embedding is: of a vocabulary no weight is needed.
_MODEL: Tree = {
    "config.json": models.as_json(models.CONFIGS["bamba"]),
    "generation_config.json": models.as_json(models.GENERATION),
}


def _byte_level() -> list[Tree]:
    return [
        {**_MODEL, **tree}
        for tree in (tokenizers.byte_level_bpe(), tokenizers.with_everything(), *_templates())
    ]


def _templates() -> tuple[Tree, ...]:
    return tokenizers.with_template(), tokenizers.with_template_object()


def _every_kind() -> list[Tree]:
    return [*_byte_level()[1:], *_sentencepiece("bpe"), *_sentencepiece("unigram")]


def _sentencepiece(kind: str) -> list[Tree]:
    return [{**_MODEL, **tokenizers.sentencepiece(kind)}]


def _call(case: Case) -> None:
    path = case.path
    tried(
        partial(calls.vocabulary_converted, path),
        partial(calls.encoded, path),
        *([partial(calls.hashed, path)] if case.random.random() < 0.2 else []),
        *calls.rarely(
            case.random, 0.03, partial(calls.command, "convert", path, "--vocab-only", "--dry-run")
        ),
    )


reader("tokenizer_json", seeds=_byte_level, mutate=files({"tokenizer.json": json_text}), weight=9)(_call)
reader("tokenizer_config", seeds=_every_kind, mutate=files({"tokenizer_config.json": json_text}), weight=5)(
    _call
)
reader(
    "special_tokens_map",
    seeds=lambda: [{**_MODEL, **tokenizers.with_everything()}, {**_MODEL, **tokenizers.with_map_alone()}],
    mutate=files({"special_tokens_map.json": json_text}),
    weight=2,
)(_call)
reader("added_tokens", seeds=_every_kind, mutate=files({"added_tokens.json": json_text}), weight=3)(_call)
reader(
    "chat_template",
    seeds=lambda: [{**_MODEL, **tree} for tree in (tokenizers.with_everything(), *_templates())],
    mutate=files({"*.jinja": plain_text, "chat_template.json": json_text}),
    weight=2,
)(_call)
reader(
    "sentencepiece_bpe",
    seeds=partial(_sentencepiece, "bpe"),
    mutate=files({"tokenizer.model": sentencepiece}),
    weight=4,
)(_call)
reader(
    "sentencepiece_unigram",
    seeds=partial(_sentencepiece, "unigram"),
    mutate=files({"tokenizer.model": sentencepiece}),
    weight=4,
)(_call)
