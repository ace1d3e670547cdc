"""Falcon-H1 with all multipliers 1: in every layer Mamba-2 beside attention, then a feed-forward network.

Sources: transformers' modeling_falcon_h1.py; llama.cpp's src/models/falcon-h1.cpp and gguf-py's tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bamba_quant.checkpoint.gguf_values import KeyValues, uint32
from bamba_quant.families import gguf_keys, hf_keys, limitations
from bamba_quant.families import hf_schema as schema
from bamba_quant.families.registry import Family, register
from bamba_quant.families.rules import Metadata, Rule, Tensors
from bamba_quant.families.shared_rules import ATTENTION, EMBEDDINGS, FEED_FORWARD_NORM, MAMBA2, MLP
from bamba_quant.families.small_models import SPECIAL_TOKENS, SmallModels
from bamba_quant.families.transforms import IDENTITY
from bamba_reference.config import Config, Layer


def _ones(value: Any) -> None:
    schema.require(all(each == 1 for each in (value if isinstance(value, list) else [value])))


_MULTIPLIERS = (
    "lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_in_multiplier",
    "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "mlp_multipliers", "ssm_multipliers",
)  # fmt: skip
# Defaults are those of transformers' ``FalconH1Config``, but for the norm.
_KEYS = {
    "vocab_size": schema.count(most=schema.MOST_TOKENS),
    "hidden_size": schema.count(4096),
    "intermediate_size": schema.count(14336),
    "num_hidden_layers": schema.count(
        32, most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers
    ),
    **hf_keys.attention(32),
    "mlp_bias": schema.flag(False),
    "hidden_act": hf_keys.SILU,
    **hf_keys.MAMBA2,
    "mamba_d_ssm": schema.count(None, write=lambda config: config.mamba_d_inner),
    "mamba_rms_norm": schema.only(True, expected="true", write=lambda config: True),
    "mamba_norm_before_gate": schema.only(False, expected="false", write=lambda config: False),
    "only projectors_bias": schema.only(False, expected="false", key="projectors_bias"),
    **{f"only {name}": schema.HfKey(_ones, "1", key=name) for name in _MULTIPLIERS},
    "rms_norm_eps": schema.positive(1e-5),
    "tie_word_embeddings": schema.flag(False),
    "max_position_embeddings": schema.count(8192),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
    **hf_keys.rope_keys(),
}


def _layers(count: int) -> tuple[Layer, ...]:
    return (Layer(("mamba2", "attention"), ("mlp",)),) * count


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    attention = hf_keys.complete_attention(values)
    theta, factors = hf_keys.rope(values)
    for key, factor in factors.items():
        if factor != 1:
            raise schema.unsupported(key, factor, "1, or nothing")
    if attention["head_dim"] % 2:
        raise schema.unsupported(
            "head_dim", attention["head_dim"], "an even number, for the rotary embedding"
        )
    if values["mamba_d_ssm"] is not None:
        width, hidden_size = values["mamba_d_ssm"], values["hidden_size"]
        values["mamba_expand"] = schema.quotient(width, hidden_size, "mamba_d_ssm", "hidden_size")
    return {
        "layers": _layers(values["num_hidden_layers"]),
        **attention,
        "mamba_expand": values["mamba_expand"],
        **hf_keys.complete_mamba2(values, _KEYS),
        "rope_theta": theta,
        "rotary_dim": attention["head_dim"],
    }


def _as_llama_cpp_has_it(rule: Rule) -> Rule:
    """Rows of q and k where transformers has them; and its name of one norm, which lacks ``.weight``."""
    if ".q_proj." in rule.name or ".k_proj." in rule.name:
        return replace(rule, transform=lambda config: IDENTITY)
    return replace(rule, gguf="blk.{i}.ffn_norm") if rule.gguf == "blk.{i}.ffn_norm.weight" else rule


def write_gguf(config: Config) -> Metadata:
    """What llama.cpp reads for ``falcon-h1`` (falcon-h1.cpp, ``load_arch_hparams``)."""
    return {
        **gguf_keys.shape(config),
        "feed_forward_length": uint32(config.intermediate_size),
        **gguf_keys.attention(config),
        "attention.head_count_kv": uint32(config.num_key_value_heads),
        "rope.dimension_count": uint32(config.rotary_dim),
        **gguf_keys.mamba2(config),
    }


def read_gguf(values: KeyValues, tensors: Tensors) -> Config:
    """``write_gguf`` inverted."""
    reader = gguf_keys.Reader(values, tensors)
    attention = reader.attention()
    return Config(
        **reader.shape(),
        intermediate_size=reader.count("feed_forward_length"),
        **attention | {"layers": _layers(reader.blocks())},
        rotary_dim=reader.rotary_dim(attention["head_dim"]),
        mlp_bias=reader.has_bias("ffn_up"),
        **reader.mamba2(),
    )


def check_gguf(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp cannot represent."""
    bias = ("attention_bias", config.attention_bias, not config.attention_bias, "false")
    limitations.check((*limitations.mixer(config), *limitations.common(config), bias))
    return ()


register(
    Family(
        name="falcon_h1",
        hf_architectures=("FalconH1ForCausalLM",),
        gguf_architectures=("falcon-h1",),
        rules=tuple(
            map(_as_llama_cpp_has_it, (*EMBEDDINGS, *MAMBA2, *ATTENTION, FEED_FORWARD_NORM, *MLP))
        ),
        hf_schema=schema.HfSchema("transformers' FalconH1Config", _KEYS, _complete),
        gguf_metadata=write_gguf,
        check_gguf=check_gguf,
        config_of_gguf=read_gguf,
        small_models=SmallModels(
            transformers_class="FalconH1ForCausalLM",
            keys={
                "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 128, "mamba_n_heads": 8,
                "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_rms_norm": True,
                "mamba_norm_before_gate": False, **SPECIAL_TOKENS,
            },
            cases={"plain": {}, "groups 2": {"mamba_n_groups": 2}},
            reference_cases={"falcon h1": {}, "falcon h1, tied": {"tie_word_embeddings": True, "mamba_d_conv": 2}},
            multiples_of_128={
                "hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "mamba_d_ssm": 256,
                "mamba_n_heads": 16, "mamba_d_state": 56,
            },
        ),
    )
)  # fmt: skip
