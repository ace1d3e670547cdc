"""What vLLM and transformers need or get wrong when they load a family's quantized checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bamba_quant.families.shared_rules import in_proj_sections
from bamba_reference.config import Config

# Where each expert is a tensor, loaders stack those of a layer.
EXPERTS = frozenset({"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"})
ATTENTION_INPUTS = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Merged:
    """Matrices that vLLM runs as one matmul with several outputs: their roles, and the rows of each output.

    A block of weights with one scale must lie in one output: all outputs but the last must be whole blocks high, or
    vLLM does not load the layer (fp8_utils.py, ``validate_fp8_block_shape``).
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
    """How vLLM 0.23 and transformers 5.23 load the family.

    ``vllm`` maps parts of a module's name, with ``{i}`` for the layer, to those in vLLM, with ``{beside}`` for the
    layer plus the number of layers; None means that vLLM's class has no quantized layers.
    ``units`` are roles of a layer that loaders need to be all quantized or none, ``merged`` the matmuls whose outputs
    must be whole blocks. ``experts`` are the names, with ``{i}`` for the layer, of the module of stacked experts.
    ``initialized`` are roles whose ``weight`` transformers reads while it loads
    (``_init_weights``), which packed layers lack. ``renamed``: transformers renames the
    tensors while it loads.
    """

    vllm: Mapping[str, str] | None = None
    units: tuple[frozenset[str], ...] = ()
    merged: tuple[Merged, ...] = ()
    experts: tuple[str, ...] = ()
    initialized: frozenset[str] = frozenset()
    renamed: bool = False
