"""Falcon-H1's config.json; defaults are those of transformers' ``FalconH1Config`` (configuration_falcon_h1.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Config, Layer


def layers(count: int) -> tuple[Layer, ...]:
    """``count`` layers, all alike."""
    return (Layer(("mamba2", "attention"), ("mlp",)),) * count


def _inverse(value: Any) -> float:
    return 1 / float(schema.positive(None).parse(value))


def _multipliers(field: str, count: int) -> schema.HfKey:
    """A list of ``count`` positive numbers, all 1 by default."""

    def parse(value: Any) -> tuple[float, ...]:
        schema.require(isinstance(value, list | tuple) and len(value) == count)
        return tuple(map(schema.positive(None).parse, value))

    def write(config: Config) -> list[float]:
        return list(map(schema.shortest, getattr(config, field)))

    return schema.HfKey(parse, f"{count} positive finite numbers", (1.0,) * count, write=write)


def _written(value: Any) -> Callable[[Config], Any]:
    return lambda config: value


_KEYS = {
    "vocab_size": schema.count(128000, most=schema.MOST_TOKENS),
    "hidden_size": schema.count(4096),
    "intermediate_size": schema.count(14336),
    "num_hidden_layers": schema.count(most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers),
    **hf_keys.attention(32),
    "num_key_value_heads": schema.count_or_null(8),
    "attn_layer_indices": schema.only(expected="null (attention in every layer)"),
    "mlp_bias": schema.flag(False),
    "mamba_use_mlp": schema.only(True, expected="true"),
    "hidden_act": hf_keys.SILU,
    **hf_keys.MAMBA2,
    "mamba_d_ssm": schema.count_or_null(1024, write=lambda config: config.mamba_d_inner),
    "mamba_expand": replace(hf_keys.MAMBA2["mamba_expand"], write=_written(schema.OMITTED)),
    "projectors_bias": schema.flag(False),
    "mamba_rms_norm": schema.flag(False),
    "norm_before_gate": schema.flag(True, key="mamba_norm_before_gate", write=_written(False)),
    "embedding_multiplier": schema.positive(1.0),
    "logits_scaling": schema.HfKey(
        _inverse,
        "a positive finite number",
        1.0,
        key="lm_head_multiplier",
        write=lambda config: schema.shortest(1 / config.logits_scaling),
    ),
    "attention_in_multiplier": schema.positive(1.0),
    "attention_out_multiplier": schema.positive(1.0),
    "key_multiplier": schema.positive(1.0),
    "ssm_in_multiplier": schema.positive(1.0),
    "ssm_out_multiplier": schema.positive(1.0),
    "ssm_multipliers": _multipliers("ssm_multipliers", 5),
    "mlp_multipliers": _multipliers("mlp_multipliers", 2),
    "rms_norm_eps": schema.positive(1e-5),
    "tie_word_embeddings": schema.flag(False),
    "max_position_embeddings": schema.count(8192),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
    **hf_keys.rope_keys(),
}


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    attention = hf_keys.complete_attention(values)
    theta, factors = hf_keys.rope(values)
    for key, factor in factors.items():
        if factor != 1:  # transformers' Falcon-H1 rotates whole heads whatever this key says
            raise schema.unsupported(key, factor, "1, or nothing")
    if attention["head_dim"] % 2:
        raise schema.unsupported(
            "head_dim", attention["head_dim"], "an even number, for the rotary embedding"
        )
    if values["mamba_rms_norm"] and values["norm_before_gate"]:
        raise schema.unsupported("mamba_norm_before_gate", True, "false, where mamba_rms_norm is true")
    return {
        "layers": layers(values["num_hidden_layers"]),
        **attention,
        **hf_keys.complete_mamba2(values, _KEYS),
        "mamba_expand": 0,  # heads and their size give the width
        "rope_theta": theta,
        "rotary_dim": attention["head_dim"],
    }


SCHEMA = schema.HfSchema("transformers' FalconH1Config", _KEYS, _complete)
