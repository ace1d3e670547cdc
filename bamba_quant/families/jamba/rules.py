"""The tensors of Jamba.

Sources: transformers' modeling_jamba.py and its conversion_mapping.py for the names in checkpoints; gguf-py's
tensor_mapping.py for those in GGUF.
"""

from __future__ import annotations

from bamba_quant.families.rules import Rule
from bamba_quant.families.shared_rules import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    FEED_FORWARD_NORM,
    LAYER,
    MAMBA1,
    MLP,
    expert_down,
    expert_up,
    of_block,
    router,
)
from bamba_reference.config import Config

# A checkpoint has a tensor for each expert; transformers 5 stacks them in memory, under the second name.
EXPERTS = LAYER + "feed_forward.experts"


def _alone(kind: str) -> str:
    return f"{EXPERTS}.*.{kind}_proj.weight"


def _states(config: Config) -> tuple[int]:
    return (config.mamba_d_state,)


# fmt: off
_NORMS = of_block(
    "mamba1",
    Rule(LAYER + "mamba.dt_layernorm.weight", BLOCK + "ssm_dt_norm.weight", "norm",
         lambda c: (c.mamba_time_step_rank,)),
    Rule(LAYER + "mamba.b_layernorm.weight", BLOCK + "ssm_b_norm.weight", "norm", _states),
    Rule(LAYER + "mamba.c_layernorm.weight", BLOCK + "ssm_c_norm.weight", "norm", _states),
)
_MIXTURE = of_block(
    "moe",
    Rule(LAYER + "moe.router.weight", BLOCK + "ffn_gate_inp.weight", "ffn_gate_inp", router,
         hf=(LAYER + "feed_forward.router.weight",)),
    Rule(LAYER + "moe.gate_proj.weight", BLOCK + "ffn_gate_exps.weight", "ffn_gate_exps", expert_up,
         hf=(_alone("gate"), f"{EXPERTS}.gate_up_proj"), section=(0, 2)),
    Rule(LAYER + "moe.up_proj.weight", BLOCK + "ffn_up_exps.weight", "ffn_up_exps", expert_up,
         hf=(_alone("up"), f"{EXPERTS}.gate_up_proj"), section=(1, 2)),
    Rule(LAYER + "moe.down_proj.weight", BLOCK + "ffn_down_exps.weight", "ffn_down_exps", expert_down,
         hf=(_alone("down"), f"{EXPERTS}.down_proj")),
)
# fmt: on
RULES = (*EMBEDDINGS, *MAMBA1, *_NORMS, *ATTENTION, FEED_FORWARD_NORM, *MLP, *_MIXTURE)
