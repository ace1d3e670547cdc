"""Granite 4.0's config.json; defaults are those of transformers' ``GraniteMoeHybridConfig``.

Its ``intermediate_size`` is the width of an expert, ``shared_intermediate_size`` that of the feed-forward network that
every layer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Block, single_block_layers


def _position_embedding(value: Any) -> Any:
    schema.require(value in ("nope", "rope"))
    return value


_KEYS = {
    "vocab_size": schema.count(32000, most=schema.MOST_TOKENS),
    "hidden_size": schema.count(4096),
    "expert_intermediate_size": schema.count(
        11008,
        least=0,
        key="intermediate_size",
        write=lambda config: config.expert_intermediate_size or config.intermediate_size,
    ),
    "intermediate_size": schema.count(1024, key="shared_intermediate_size"),
    "num_local_experts": schema.count(8, least=0),
    "num_experts_per_tok": schema.count(None, least=0),
    "num_hidden_layers": schema.count(
        32, most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers
    ),
    **hf_keys.listed_layers(write=lambda config: list(config.layer_types)),
    "position_embedding_type": schema.HfKey(
        _position_embedding,
        "rope, nope or null",
        "nope",
        write=lambda config: "rope" if config.rotary_dim else "nope",
    ),
    **hf_keys.attention(32),
    "embedding_multiplier": schema.positive(1.0),
    "residual_multiplier": schema.positive(1.0),
    "attention_multiplier": schema.positive(
        1.0, write=lambda config: schema.shortest(config.attention_scale)
    ),
    "logits_scaling": schema.positive(1.0),
    "hidden_act": hf_keys.SILU,
    "normalization_function": schema.only("rmsnorm", expected="rmsnorm"),
    **hf_keys.MAMBA2,
    "rms_norm_eps": schema.positive(1e-6),
    "tie_word_embeddings": schema.flag(False),
    "max_position_embeddings": schema.count(2048),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
    **hf_keys.rope_keys(),
}


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    attention = hf_keys.complete_attention(values)
    theta, factors = hf_keys.rope(values)
    for key, factor in factors.items():
        if factor != 1:  # transformers' Granite rotates whole heads whatever this key says
            raise schema.unsupported(key, factor, "1, or nothing")
    rotary_dim = attention["head_dim"] if values["position_embedding_type"] == "rope" else 0
    if rotary_dim % 2:
        raise schema.unsupported("head_dim", rotary_dim, "an even number, for the rotary embedding")
    experts = _experts(values) if values["num_local_experts"] else dict.fromkeys(_EXPERTS, 0)
    feed_forward: tuple[Block, ...] = ("moe", "mlp") if values["num_local_experts"] else ("mlp",)
    return {
        "layers": single_block_layers(hf_keys.blocks(values), feed_forward),
        **attention,
        **hf_keys.complete_mamba2(values, _KEYS),
        **experts,
        "rope_theta": theta,
        "rotary_dim": rotary_dim,
    }


_EXPERTS = ("num_experts_per_tok", "expert_intermediate_size")


def _experts(values: Mapping[str, Any]) -> dict[str, int]:
    """Experts of a token, two by default where there are several, and the width of each."""
    experts, used = values["num_local_experts"], values["num_experts_per_tok"]
    used = 2 if used is None and experts > 1 else used
    if used is None or not 1 <= used <= experts:
        raise schema.unsupported("num_experts_per_tok", used, f"a whole number from 1 to {experts}")
    if values["expert_intermediate_size"] < 1:
        raise schema.unsupported("intermediate_size", 0, "the width of an expert")
    return {"num_experts_per_tok": used, "expert_intermediate_size": values["expert_intermediate_size"]}


# How training began.
SCHEMA = schema.HfSchema(
    "transformers' GraniteMoeHybridConfig",
    _KEYS,
    _complete,
    inert=frozenset({"init_method", "pad_vocab_size_multiple"}),
)
