"""The small configurations that a family's tests run on, in the keys of transformers' configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SmallModels:
    """``transformers_class`` is the name of the model's class; ``keys`` are the base of every configuration.

    ``cases`` are named changes of ``keys``, each of which changes what is computed and can be converted to GGUF;
    ``reference_cases`` are further ones, some of which llama.cpp cannot represent, that the forward pass is compared
    with transformers on. Their names are unique among all families. ``multiples_of_128`` are keys with which every
    side of every matrix that is quantized is a multiple of 128. ``state_spaces`` gives the config.json of
    state-spaces' own code for a transformers configuration, if there is one for ``state_spaces_cases``.
    """

    transformers_class: str
    keys: Keys
    cases: Mapping[str, Keys]
    reference_cases: Mapping[str, Keys]
    multiples_of_128: Keys
    state_spaces: Callable[[Any], dict[str, Any]] | None = None
    state_spaces_cases: tuple[str, ...] = ()
