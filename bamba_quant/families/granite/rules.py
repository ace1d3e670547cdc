"""The tensors of Granite 4.0.

Sources: transformers' modeling_granitemoehybrid.py and its conversion_mapping.py for the names in checkpoints;
gguf-py's tensor_mapping.py for those in GGUF.
"""

from __future__ import annotations

from dataclasses import replace

from bamba_quant.families.rules import Rule, renamed
from bamba_quant.families.shared_rules import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    FEED_FORWARD_NORM,
    LAYER,
    MAMBA2,
    MLP,
    expert_down,
    expert_up,
    of_block,
    router,
)
from bamba_reference.config import Config


def has_experts(config: Config) -> bool:
    return config.num_local_experts > 0


def _beside_experts(rule: Rule) -> tuple[Rule, Rule]:
    """A matrix of the feed-forward network, which has another name in GGUF where experts stand beside it."""
    shared = str(rule.gguf).replace(".weight", "_shexp.weight")
    return (
        replace(rule, when=lambda config: not has_experts(config)),
        replace(rule, gguf=shared, role=f"{rule.role}_shexp", when=has_experts),
    )


# transformers 4 writes the first name to disk, and so does 5, which calls them by the second in memory.
EXPERTS = LAYER + "block_sparse_moe."
_UP = (EXPERTS + "input_linear.weight", EXPERTS + "experts.gate_up_proj")
_DOWN = (EXPERTS + "output_linear.weight", EXPERTS + "experts.down_proj")
_ROUTER = (EXPERTS + "router.layer.weight", EXPERTS + "router.weight")
_STACKED = {
    LAYER + "feed_forward.gate_proj.weight": ((LAYER + "shared_mlp.input_linear.weight",), (0, 2)),
    LAYER + "feed_forward.up_proj.weight": ((LAYER + "shared_mlp.input_linear.weight",), (1, 2)),
    LAYER + "feed_forward.down_proj.weight": ((LAYER + "shared_mlp.output_linear.weight",), (0, 1)),
}
_NAMES = {"model.final_layernorm": "model.norm", "pre_ff_layernorm": "post_attention_layernorm"}

# fmt: off
_MIXTURE = of_block(
    "moe",
    Rule(LAYER + "moe.router.weight", BLOCK + "ffn_gate_inp.weight", "ffn_gate_inp", router, hf=_ROUTER),
    Rule(LAYER + "moe.gate_proj.weight", BLOCK + "ffn_gate_exps.weight", "ffn_gate_exps", expert_up,
         hf=_UP, section=(0, 2)),
    Rule(LAYER + "moe.up_proj.weight", BLOCK + "ffn_up_exps.weight", "ffn_up_exps", expert_up,
         hf=_UP, section=(1, 2)),
    Rule(LAYER + "moe.down_proj.weight", BLOCK + "ffn_down_exps.weight", "ffn_down_exps", expert_down,
         hf=_DOWN),
)
# fmt: on
_SHARED_MLP = tuple(
    half
    for rule in MLP
    if rule.name in _STACKED
    for half in _beside_experts(replace(rule, hf=_STACKED[rule.name][0], section=_STACKED[rule.name][1]))
)
RULES = renamed((*EMBEDDINGS, *MAMBA2, *ATTENTION, FEED_FORWARD_NORM), _NAMES) + _MIXTURE + _SHARED_MLP
