"""What loaders of quantized checkpoints do otherwise in a family than its tables would have one think."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bamba_quant.families.rows import in_proj_sections
from bamba_reference.config import Config

ATTENTION_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Merged:
    """What vLLM runs as one product of several outputs: the roles of its matrices, and the rows of each output.

    A scale of blocks must not reach across outputs: all of them but the last are whole blocks high, or vLLM refuses
    the layer (fp8_utils.py, ``validate_fp8_block_shape``).
    """

    roles: tuple[str, ...]
    outputs: Callable[[Config], tuple[int, ...]]


def _heads(config: Config) -> tuple[int, ...]:
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


MERGED_ATTENTION = Merged(("attn_q", "attn_k", "attn_v"), _heads)
MERGED_MIXER = Merged(("ssm_in",), lambda config: tuple(in_proj_sections(config).values()))
MERGED_FEED_FORWARD = tuple(
    Merged(roles, lambda config: (config.intermediate_size, config.intermediate_size))
    for roles in (("ffn_gate", "ffn_up"), ("ffn_gate_shexp", "ffn_up_shexp"))
)


@dataclass(frozen=True)
class Loaders:
    """Names and habits of vLLM 0.23 and transformers 5.23.

    ``vllm`` says which parts of a module's name vLLM replaces, or is None where its class takes no quantized layers.
    ``units`` are roles of a layer that vLLM quantizes alike or not at all, and ``merged`` the products of which it
    wants whole blocks. ``experts`` are the names, with ``{i}`` for the layer, of the module that holds stacked experts,
    which no scheme quantizes. ``initialized`` are roles whose ``weight`` transformers takes hold of while it loads
    (``_init_weights``).
    """

    vllm: Mapping[str, str] | None = None
    units: tuple[frozenset[str], ...] = ()
    merged: tuple[Merged, ...] = ()
    experts: tuple[str, ...] = ()
    initialized: frozenset[str] = frozenset()
