"""Reads Granite 4.0's configurations (``GraniteMoeHybridForCausalLM``): dense or with experts, hybrid or all
attention.

Defaults are those of transformers' ``GraniteMoeHybridConfig``. Its ``intermediate_size`` is the experts';
``shared_intermediate_size`` that of the feed-forward network every layer has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bamba_quant.families import hf_reading as reading
from bamba_quant.families import hf_writing as writing
from bamba_reference.config import Config, single_block_layers

KEYS = frozenset(
    """
    hidden_size intermediate_size shared_intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim layer_types layers_block_type position_embedding_type rope_theta rope_parameters
    rope_scaling partial_rotary_factor attention_bias hidden_act normalization_function mamba_expand mamba_n_heads
    mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv mamba_conv_bias mamba_proj_bias time_step_limit
    rms_norm_eps tie_word_embeddings max_position_embeddings embedding_multiplier residual_multiplier
    attention_multiplier logits_scaling num_local_experts num_experts_per_tok
    """.split()
)

# How training began and what it was told: of no consequence afterwards.
INERT = frozenset({"init_method", "pad_vocab_size_multiple"})


def read(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    reading.refuse_unknown_keys(hf, KEYS | INERT, ignore, "transformers' GraniteMoeHybridConfig")
    if hf.get("normalization_function") not in (None, "rmsnorm"):
        raise reading.unsupported("normalization_function", hf["normalization_function"], "rmsnorm")
    count = reading.integer(hf, "num_hidden_layers", default=32, most=reading.MOST_LAYERS)
    hidden_size = reading.integer(hf, "hidden_size", default=4096)
    heads = reading.integer(hf, "num_attention_heads", default=32)
    kv_heads = reading.integer(hf, "num_key_value_heads", default=heads)
    head_dim = reading.head_dim(hf, hidden_size, heads)
    reading.quotient(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    expand = reading.integer(hf, "mamba_expand", default=2)
    mamba_heads = reading.integer(hf, "mamba_n_heads", default=128)
    d_head = reading.mamba2_head_dim(hf, expand, hidden_size, mamba_heads, "mamba_d_head")
    groups = reading.integer(hf, "mamba_n_groups", default=1)
    reading.quotient(mamba_heads, groups, "mamba_n_heads", "mamba_n_groups")
    rotary_dim, rope_theta = _rotary(hf, head_dim)
    experts = reading.integer(hf, "num_local_experts", default=8, least=0)
    return Config(
        vocab_size=reading.vocab_size(hf, default=32000),
        hidden_size=hidden_size,
        intermediate_size=reading.integer(hf, "shared_intermediate_size", default=1024),
        layers=single_block_layers(
            reading.agreed(reading.layer_types_named(hf, count), default=reading.alike("mamba2", count)),
            feed_forward=("moe", "mlp") if experts else ("mlp",),
        ),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        attention_bias=reading.boolean(hf, "attention_bias", default=False),
        mlp_bias=False,
        hidden_act=reading.only_silu(hf),
        mamba_expand=expand,
        mamba_n_heads=mamba_heads,
        mamba_d_head=d_head,
        mamba_n_groups=groups,
        mamba_d_state=reading.integer(hf, "mamba_d_state", default=256),
        mamba_d_conv=reading.integer(hf, "mamba_d_conv", default=4),
        mamba_conv_bias=reading.boolean(hf, "mamba_conv_bias", default=True),
        mamba_proj_bias=reading.boolean(hf, "mamba_proj_bias", default=False),
        time_step_limit=reading.time_step_limit("time_step_limit", hf.get("time_step_limit")),
        rms_norm_eps=reading.positive("rms_norm_eps", hf.get("rms_norm_eps"), default=1e-6),
        tie_word_embeddings=reading.boolean(hf, "tie_word_embeddings", default=False),
        max_position_embeddings=reading.integer(hf, "max_position_embeddings", default=2048),
        bos_token_id=reading.token_id(hf, "bos_token_id"),
        eos_token_ids=reading.token_ids("eos_token_id", hf.get("eos_token_id")),
        pad_token_id=reading.token_id(hf, "pad_token_id"),
        embedding_multiplier=_multiplier(hf, "embedding_multiplier"),
        residual_multiplier=_multiplier(hf, "residual_multiplier"),
        attention_multiplier=_multiplier(hf, "attention_multiplier"),
        logits_scaling=_multiplier(hf, "logits_scaling"),
        num_local_experts=experts,
        num_experts_per_tok=_experts_per_token(hf, experts),
        expert_intermediate_size=reading.integer(hf, "intermediate_size", default=11008) if experts else 0,
    )


def _multiplier(hf: Mapping[str, Any], key: str) -> float:
    return reading.positive(key, hf.get(key), default=1.0)


def _experts_per_token(hf: Mapping[str, Any], experts: int) -> int:
    if experts == 0:
        return 0
    return reading.integer(hf, "num_experts_per_tok", default=2 if experts > 1 else None, most=experts)


def _rotary(hf: Mapping[str, Any], head_dim: int) -> tuple[int, float]:
    """Width and base of the rotary embedding: the whole head under "rope", else nothing."""
    rope = reading.rope_sources(hf)
    theta, kind = reading.rope_theta(rope), hf.get("position_embedding_type")
    for prefix, source in rope:
        # transformers' Granite rotates whole heads whatever this key says.
        if source.get("partial_rotary_factor") not in (None, 1):
            raise reading.unsupported(
                f"{prefix}partial_rotary_factor", source["partial_rotary_factor"], "1, or nothing"
            )
    if kind not in (None, "nope", "rope"):
        raise reading.unsupported("position_embedding_type", kind, "rope, nope or null")
    if kind != "rope":
        return 0, theta
    if head_dim % 2:
        raise reading.unsupported("head_dim", head_dim, "an even number, for the rotary embedding")
    return head_dim, theta


def write(config: Config) -> dict[str, Any]:
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
        **writing.attention(config),
        "embedding_multiplier": writing.shortest(config.embedding_multiplier),
        "residual_multiplier": writing.shortest(config.residual_multiplier),
        "attention_multiplier": writing.shortest(config.attention_scale),
        "logits_scaling": writing.shortest(config.logits_scaling),
        "hidden_act": config.hidden_act,
        **writing.mamba2(config),
        "rms_norm_eps": writing.shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **writing.special_tokens(config),
        "use_cache": True,
    }
