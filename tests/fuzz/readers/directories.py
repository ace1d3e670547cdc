"""Readers of what a model directory holds beside its tokenizer: weights, index, configuration, card."""

from __future__ import annotations

from functools import partial

from tests.fuzz import calls, oracles
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.json_text import json_text
from tests.fuzz.mutations.safetensors import safetensors
from tests.fuzz.mutations.text import card
from tests.fuzz.registry import Case, reader
from tests.fuzz.runner import tried
from tests.fuzz.seeds import models, quantized, tokenizers
from tests.fuzz.tree import Tree


def _weights() -> list[Tree]:
    return [
        models.directory("bamba"),
        models.directory(models.WITH_EXPERTS, "BF16"),
        models.directory("mamba", "F16"),
    ]


@reader("safetensors", seeds=_weights, mutate=files({"*.safetensors": safetensors}), weight=8)
def read_safetensors(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.read_weights, path),
                partial(calls.converted, path, outtype="q8_0"),
                partial(calls.quantized, path),
                partial(calls.described, path),
                partial(calls.read_stored, path),
            ],
        ),
        *calls.rarely(case.random, 0.05, partial(calls.command, "inspect", path, "--tensors")),
    )
    # Not of a file that is another one by now.
    if isinstance(case.tree.get("model.safetensors"), bytes):
        oracles.safetensors_accepts(path / "model.safetensors")


def _sharded() -> list[Tree]:
    return [models.sharded("bamba"), models.sharded("mamba2")]


@reader(
    "index",
    seeds=_sharded,
    mutate=files({"*.index.json": json_text}, others=["*.safetensors"]),
    weight=4,
)
def read_index(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.read_weights, path),
                partial(calls.converted, path),
            ],
        )
    )


def _families() -> list[Tree]:
    return [models.directory(family) for family in models.CONFIGS]


@reader("config", seeds=_families, mutate=files({"config.json": json_text}), weight=9)
def read_config(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.inspected, path / "config.json"),
                partial(calls.read_weights, path),
                partial(calls.converted, path),
                partial(calls.vocabulary_converted, path),
                partial(calls.quantized, path),
                partial(calls.described, path),
            ],
        ),
        *calls.rarely(
            case.random,
            0.1,
            partial(calls.command, "inspect", path),
            partial(calls.command, "inspect", path, "--json"),
            partial(calls.command, "convert", path, "--dry-run"),
            partial(calls.command, "fp8", path, path / "out", "--dry-run"),
        ),
    )


def _alone() -> list[Tree]:
    return [
        {
            name: content
            for name, content in models.directory(family).items()
            if not name.endswith(".safetensors")
        }
        for family in models.CONFIGS
    ]


@reader("config_alone", seeds=_alone, mutate=files({"config.json": json_text}), weight=5)
def read_config_alone(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.inspected, path / "config.json"),
                partial(calls.converted, path, allow_config_only=True),
                partial(calls.quantized, path, allow_config_only=True),
            ],
        )
    )


def _quantized() -> list[Tree]:
    return [quantized.quantized(scheme) for scheme in quantized.SCHEMES]


@reader(
    "quantization_config",
    seeds=_quantized,
    mutate=files({"config.json": quantized.configuration, "*.safetensors": safetensors}),
    weight=8,
)
def read_quantization_config(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.read_weights, path),
                partial(calls.converted, path),
                partial(calls.described, path),
                # Which refuses whatever is quantized already.
                *([] if case.valid else [partial(calls.quantized, path)]),
            ],
            most=1,
        )
    )


def _cards() -> list[Tree]:
    small = {
        name: content
        for name, content in models.directory("mamba").items()
        if name not in ("generation_config.json",)
    }
    return [small]


@reader("card", seeds=_cards, mutate=files({"README.md": card}), weight=5)
def read_card(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.converted, path),
                partial(calls.quantized, path),
                partial(calls.vocabulary_converted, path),
            ],
        )
    )


def _generation() -> list[Tree]:
    return [models.directory("bamba"), models.directory("mamba")]


@reader("generation_config", seeds=_generation, mutate=files({"generation_config.json": json_text}), weight=4)
def read_generation_config(case: Case) -> None:
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.vocabulary_converted, path),
                partial(calls.quantized, path),
                partial(calls.encoded, path),
                partial(calls.read_weights, path),
            ],
        )
    )


_METADATA = {
    "general.name": "Mill", "general.author": "acme", "general.license": "mit", "general.tags": ["a", "b"],
    "general.version": None,
    "general.sampling.temp": 0.7, "general.sampling.top_k": 40, "general.base_models": [{"name": "Mill",
    "organization": "acme"}],
    "general.datasets": [{"name": "books", "url": "https://example.org"}],
}  # fmt: skip


def _with_metadata() -> list[Tree]:
    return [{**models.directory("mamba"), "metadata.json": models.as_json(_METADATA)}]


@reader("metadata", seeds=_with_metadata, mutate=files({"metadata.json": json_text}), weight=3)
def read_metadata(case: Case) -> None:
    calls.converted(case.path, vocab_only=True, metadata=case.path / "metadata.json")


@reader(
    "any_file",
    seeds=lambda: [
        {**models.directory("bamba"), **tokenizers.with_everything(), "LICENSE": b"A license.\n"},
        *_sharded(),
        quantized.quantized("fp8-block"),
    ],
    mutate=files({"*": lambda random, raw: raw}, odd=1.0),
    weight=4,
)
def read_any_file(case: Case) -> None:
    """Something else than a file at one of a directory's names."""
    path = case.path
    tried(
        *calls.some(
            case.random,
            [
                partial(calls.inspected, path),
                partial(calls.read_weights, path),
                partial(calls.converted, path),
                *([] if case.valid else [partial(calls.quantized, path)]),
                partial(calls.encoded, path),
                partial(calls.described, path),
            ],
        )
    )
