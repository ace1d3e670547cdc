"""What loaders of quantized checkpoints do otherwise in a family than its tables would have one think."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ATTENTION_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Loaders:
    """Names and habits of vLLM 0.23 and transformers 5.23.

    ``vllm`` says which parts of a module's name vLLM replaces, or is None where its class takes no quantized layers.
    ``units`` are roles of a layer that vLLM quantizes alike or not at all. ``experts`` are the names, with ``{i}``
    for the layer, of the module that holds stacked experts, which no scheme quantizes. ``initialized`` are roles
    whose ``weight`` transformers takes hold of while it loads (``_init_weights``).
    """

    vllm: Mapping[str, str] | None = None
    units: tuple[frozenset[str], ...] = ()
    experts: tuple[str, ...] = ()
    initialized: frozenset[str] = frozenset()
