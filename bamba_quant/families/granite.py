"""Granite 4.0, dense or with experts: ``granitehybrid`` where it has Mamba-2 layers, else ``granite(moe)``.

Sources: transformers' modeling_granitemoehybrid.py and its conversion_mapping.py for the left-hand names; llama.cpp's
src/models/granite-hybrid.cpp, granite.cpp, granite-moe.cpp and gguf-py's tensor_mapping.py for the right-hand ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import array, boolean, float32, uint32
from bamba_quant.families import keys
from bamba_quant.families import limitations as refusals
from bamba_quant.families.gguf_reader import Reader
from bamba_quant.families.rows import ATTENTION, BLOCK, EMBEDDINGS, FEED_FORWARD, LAYER, MAMBA2
from bamba_quant.families.rules import Architecture, Metadata, Rule, Tensors, Values, register, spelled
from bamba_quant.families.runtime_compat import (
    ATTENTION_INPUTS,
    MERGED_ATTENTION,
    MERGED_FEED_FORWARD,
    MERGED_MIXER,
    Loaders,
)
from bamba_reference.config import Config

HYBRID, DENSE, EXPERTS = "granitehybrid", "granite", "granitemoe"


def _has_experts(config: Config) -> bool:
    return config.num_local_experts > 0


def _expert_up(config: Config) -> tuple[int, int, int]:
    return (config.num_local_experts, config.expert_intermediate_size, config.hidden_size)


def _beside_experts(rule: Rule) -> tuple[Rule, Rule]:
    """A matrix of the feed-forward network, which has another name in GGUF where experts stand beside it."""
    shared = str(rule.gguf).replace(".weight", "_shexp.weight")
    return (
        replace(rule, when=lambda config: not _has_experts(config)),
        replace(rule, gguf=shared, role=f"{rule.role}_shexp", when=_has_experts),
    )


# transformers 4 writes the first name to disk, and so does 5, which calls them by the second in memory.
_EXPERTS = LAYER + "block_sparse_moe."
_UP = (_EXPERTS + "input_linear.weight", _EXPERTS + "experts.gate_up_proj")
_DOWN = (_EXPERTS + "output_linear.weight", _EXPERTS + "experts.down_proj")
_ROUTER = (_EXPERTS + "router.layer.weight", _EXPERTS + "router.weight")
_STACKED = {
    LAYER + "feed_forward.gate_proj.weight": ((LAYER + "shared_mlp.input_linear.weight",), (0, 2)),
    LAYER + "feed_forward.up_proj.weight": ((LAYER + "shared_mlp.input_linear.weight",), (1, 2)),
    LAYER + "feed_forward.down_proj.weight": ((LAYER + "shared_mlp.output_linear.weight",), (0, 1)),
}
_NAMES = {"model.final_layernorm": "model.norm", "pre_ff_layernorm": "post_attention_layernorm"}

# fmt: off
_MIXTURE = (
    Rule(LAYER + "moe.router.weight", BLOCK + "ffn_gate_inp.weight", "ffn_gate_inp",
         lambda c: (c.num_local_experts, c.hidden_size), when=_has_experts, hf=_ROUTER),
    Rule(LAYER + "moe.gate_proj.weight", BLOCK + "ffn_gate_exps.weight", "ffn_gate_exps", _expert_up,
         when=_has_experts, hf=_UP, section=(0, 2)),
    Rule(LAYER + "moe.up_proj.weight", BLOCK + "ffn_up_exps.weight", "ffn_up_exps", _expert_up,
         when=_has_experts, hf=_UP, section=(1, 2)),
    Rule(LAYER + "moe.down_proj.weight", BLOCK + "ffn_down_exps.weight", "ffn_down_exps",
         lambda c: (c.num_local_experts, c.hidden_size, c.expert_intermediate_size), when=_has_experts, hf=_DOWN),
)
# fmt: on
_SHARED_MLP = tuple(
    half
    for rule in FEED_FORWARD
    if rule.name in _STACKED
    for half in _beside_experts(replace(rule, hf=_STACKED[rule.name][0], section=_STACKED[rule.name][1]))
)
_NORMS = tuple(rule for rule in FEED_FORWARD if rule.role == "norm")
RULES = spelled(EMBEDDINGS + MAMBA2 + ATTENTION + _NORMS, _NAMES) + _MIXTURE + _SHARED_MLP


def _gguf_name(config: Config) -> str:
    if config.mamba_layers:
        return HYBRID
    return EXPERTS if _has_experts(config) else DENSE


def _gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp reads (``load_arch_hparams`` of the three; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in config.layer_types]
    written = {
        **keys.shape(config),
        "embedding_scale": float32(config.embedding_multiplier),
        "residual_scale": float32(config.residual_multiplier),
        "logit_scale": float32(config.logits_scaling),
        **keys.attention(config),
        "attention.scale": float32(config.attention_scale),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        # The rows of a head even where none is rotated: granite.cpp asserts it.
        "rope.dimension_count": uint32(config.head_dim),
        # llama.cpp reads this key as the switch of the rotary embedding.
        "rope.scaling.finetuned": boolean(config.rotary_dim > 0),
        "feed_forward_length": uint32(config.intermediate_size),
    }
    if _has_experts(config):
        written |= {
            "feed_forward_length": uint32(config.expert_intermediate_size),
            "expert_shared_feed_forward_length": uint32(config.intermediate_size),
            "expert_count": uint32(config.num_local_experts),
            "expert_used_count": uint32(config.num_experts_per_tok),
        }
    # llama.cpp's converter writes these where no layer needs them, too.
    return written | keys.mamba2(config)


def _check_gguf(config: Config) -> tuple[str, ...]:
    """What llama.cpp's graphs have no place for. Raises ``ArchitectureError``."""
    multipliers = {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": config.logits_scaling,
    }
    mixer = (refusals.expansion(config), *refusals.mixer(config)) if config.mamba_layers else ()
    refusals.refuse(
        (
            *mixer,
            *refusals.common(config),
            *(
                (key, value, value != 0, "another number (0 stands for none)")
                for key, value in multipliers.items()
            ),
            (
                "layer_types",
                "attention in no layer",
                bool(config.attention_layers),
                "at least one attention layer",
            ),
            # granite-moe.cpp does not read the switch of the rotary embedding.
            (
                "position_embedding_type",
                "nope, with experts and attention in every layer",
                config.rotary_dim > 0 or _gguf_name(config) != EXPERTS,
                "rope",
            ),
        )
    )
    return ()


def _config_of_gguf(values: Values, tensors: Tensors) -> Config:
    """``_gguf_metadata`` read back; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    read = Reader(values, tensors)
    attention = read.attention()
    experts = read.experts()
    length = read.count("feed_forward_length")
    return Config(
        **read.shape(),
        **attention,
        **read.mamba2(),
        intermediate_size=read.count("expert_shared_feed_forward_length") if experts else length,
        rotary_dim=read.rotary_dim(attention["head_dim"]) if read.flag("rope.scaling.finetuned", True) else 0,
        mlp_bias=False,
        hidden_act="silu",
        embedding_multiplier=read.scale("embedding_scale") or 1.0,
        residual_multiplier=read.scale("residual_scale") or 1.0,
        attention_multiplier=read.scale("attention.scale"),
        logits_scaling=read.scale("logit_scale") or 1.0,
        num_local_experts=experts,
        num_experts_per_tok=read.count("expert_used_count", most=experts) if experts else 0,
        expert_intermediate_size=length if experts else 0,
    )


def _hf_config(config: Config) -> dict[str, Any]:
    """config.json in the keys of transformers 4 (configuration_granitemoehybrid.py), which 5 reads too."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_intermediate_size or config.intermediate_size,
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": list(config.layer_types),
        "position_embedding_type": "rope" if config.rotary_dim else "nope",
        **keys.hf_attention(config),
        "embedding_multiplier": keys.shortest(config.embedding_multiplier),
        "residual_multiplier": keys.shortest(config.residual_multiplier),
        "attention_multiplier": keys.shortest(config.attention_scale),
        "logits_scaling": keys.shortest(config.logits_scaling),
        "hidden_act": config.hidden_act,
        **keys.hf_mamba2(config),
        "rms_norm_eps": keys.shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **keys.hf_special_tokens(config),
        "use_cache": True,
    }


# vLLM's granitemoehybrid.py; transformers' modeling_granitemoehybrid.py calls the experts by the first of their names,
# and so did vLLM before they were a layer of their own.
_LOADERS = Loaders(
    vllm={".mamba.": ".mixer."},
    units=(ATTENTION_INPUTS,),
    merged=(MERGED_ATTENTION, MERGED_MIXER, *MERGED_FEED_FORWARD),
    experts=(_EXPERTS + "experts", _EXPERTS + "experts.routed_experts"),
)

GRANITE = register(
    Architecture(
        name="granitemoehybrid",
        hf_architectures=("GraniteMoeHybridForCausalLM",),
        gguf_architectures=(HYBRID, DENSE, EXPERTS),
        rules=RULES,
        gguf_metadata=_gguf_metadata,
        check_gguf=_check_gguf,
        config_of_gguf=_config_of_gguf,
        hf_config=_hf_config,
        reads_gguf=keys.is_granite,
        gguf_name=_gguf_name,
        loaders=_LOADERS,
    )
)
