"""The small configurations that a family's tests run on, in the keys of transformers' configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Keys = Mapping[str, Any]

SPECIAL_TOKENS: Keys = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Models of mixers alone.
MIXERS_ALONE: Keys = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "state_size": 16,
    "conv_kernel": 4,
    **SPECIAL_TOKENS,
}
# A layer of them with rows of whole blocks of 256.
WIDE_MIXER: Keys = {"hidden_size": 256, "vocab_size": 64, "num_hidden_layers": 1}


@dataclass(frozen=True)
class SmallModels:
    """``transformers_class`` is the name of the model's class; ``keys`` are the base of every configuration.

    ``cases`` are named changes of ``keys``, each of which changes what is computed and can be converted to GGUF;
    ``reference_cases`` are further ones, some of which llama.cpp cannot represent, that the forward pass is compared
    with transformers on. Their names are unique among all families. ``kinds`` are the cases that differ in the kinds
    of tensors, with experts last: tests run on them that are not about details. ``multiples_of_128`` are keys with
    which every side of every matrix that is quantized is a multiple of 128, in each of ``kinds``.

    ``state_spaces`` gives the config.json of state-spaces' own code for a transformers configuration, if there is one
    for ``state_spaces_cases``.

    ``refused_by_gguf`` are changes of ``keys`` that llama.cpp cannot represent, each with the field of ``Config`` that
    the error names. ``whole_blocks`` are keys over ``multiples_of_128`` with which every part of ``in_proj`` is whole
    blocks of 128 rows, where vLLM quantizes it; ``cut_blocks`` are keys over ``multiples_of_128``, each with the role
    of which vLLM refuses blocks, or "" for none. ``llama_quantize`` are changes of ``keys`` that show what
    llama-quantize's rules look at: key-value heads, experts, ties, lengths of rows; ``llama_quantize_by_layer`` those
    where they go by the layer. Their names are unique among all families.
    """

    transformers_class: str
    keys: Keys
    cases: Mapping[str, Keys]
    reference_cases: Mapping[str, Keys]
    multiples_of_128: Keys
    kinds: tuple[str, ...] = ("plain",)
    state_spaces: Callable[[Any], dict[str, Any]] | None = None
    state_spaces_cases: tuple[str, ...] = ()
    refused_by_gguf: tuple[tuple[Keys, str], ...] = ()
    whole_blocks: Keys | None = None
    cut_blocks: tuple[tuple[Keys, str], ...] = ()
    llama_quantize: Mapping[str, Keys] = field(default_factory=dict)
    llama_quantize_by_layer: Mapping[str, Keys] = field(default_factory=dict)
