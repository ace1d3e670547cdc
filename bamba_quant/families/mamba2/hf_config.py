"""Reads Mamba-2's configurations: transformers' ``Mamba2ForCausalLM``, Codestral-Mamba's, state-spaces' own.

Defaults are those of transformers' ``Mamba2Config``, in state-spaces' spelling those of its ``Mamba2``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bamba_quant.families import hf_reading as reading
from bamba_quant.families import hf_writing as writing
from bamba_quant.families import state_spaces
from bamba_reference.config import Config, single_block_layers
from bamba_reference.errors import ConfigError, repr_short

KEYS = state_spaces.KEYS | frozenset(
    """
    hidden_size num_hidden_layers num_heads head_dim state_size n_groups conv_kernel expand use_bias use_conv_bias
    hidden_act layer_norm_epsilon residual_in_fp32 time_step_limit tie_word_embeddings intermediate_size
    """.split()
)

# How dt was drawn before training. ``norm_before_gate``, true in Codestral-Mamba, is not read by transformers 5.23,
# which normalizes after the gate, as state-spaces' code does where ``ssm_cfg`` says nothing else.
INERT = state_spaces.INERT | frozenset(
    """
    time_step_rank time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme
    rescale_prenorm_residual norm_before_gate
    """.split()
)

_SSM_KEYS = frozenset("d_state d_conv expand headdim ngroups bias conv_bias dt_limit d_ssm".split())


def read(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    reading.refuse_unknown_keys(
        hf, KEYS | INERT, ignore, "transformers' Mamba2Config and state-spaces' MambaConfig"
    )
    spelled = state_spaces.spellings(hf, "Mamba2", _SSM_KEYS, ignore)
    count = reading.integer(*spelled.top("num_hidden_layers", "n_layer"), most=reading.MOST_LAYERS)
    hidden_size = reading.integer(*spelled.top("hidden_size", "d_model"))
    expand = reading.integer(*spelled.ssm("expand", "expand"), default=2)
    values, head_key = spelled.ssm("head_dim", "headdim")
    d_head = reading.integer(values, head_key, default=64)
    heads = reading.integer(hf, "num_heads", default=max(1, expand * hidden_size // d_head))
    reading.mamba2_head_dim({"head_dim": d_head}, expand, hidden_size, heads, "head_dim")
    for values, key in ((hf, "intermediate_size"), (hf, "d_inner"), (spelled.ssm_cfg, "d_ssm")):
        if values.get(key) not in (None, expand * hidden_size):
            raise ConfigError(
                f"{key} is not expand × hidden_size",
                found=repr_short(values[key]),
                expected=f"{expand} × {hidden_size} = {expand * hidden_size}",
            )
    groups = reading.integer(*spelled.ssm("n_groups", "ngroups"), default=1 if spelled.original else 8)
    reading.quotient(heads, groups, "num_heads", "n_groups")
    limit, limit_key = spelled.ssm("time_step_limit", "dt_limit")
    return Config(
        vocab_size=spelled.vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=0,
        layers=single_block_layers(reading.alike("mamba2", count)),
        num_attention_heads=0,
        num_key_value_heads=0,
        head_dim=0,
        rotary_dim=0,
        rope_theta=10000.0,
        attention_bias=False,
        mlp_bias=False,
        hidden_act=reading.only_silu(hf),
        mamba_expand=expand,
        mamba_n_heads=heads,
        mamba_d_head=d_head,
        mamba_n_groups=groups,
        mamba_d_state=reading.integer(*spelled.ssm("state_size", "d_state"), default=128),
        mamba_d_conv=reading.integer(*spelled.ssm("conv_kernel", "d_conv"), default=4),
        mamba_conv_bias=reading.boolean(*spelled.ssm("use_conv_bias", "conv_bias"), default=True),
        mamba_proj_bias=reading.boolean(*spelled.ssm("use_bias", "bias"), default=False),
        time_step_limit=reading.time_step_limit(limit_key, limit.get(limit_key)),
        rms_norm_eps=reading.positive("layer_norm_epsilon", hf.get("layer_norm_epsilon"), default=1e-5),
        tie_word_embeddings=reading.boolean(
            *spelled.top("tie_word_embeddings", "tie_embeddings"), default=spelled.original
        ),
        max_position_embeddings=reading.NO_POSITIONS,
        bos_token_id=reading.token_id(hf, "bos_token_id"),
        eos_token_ids=reading.token_ids("eos_token_id", hf.get("eos_token_id")),
        pad_token_id=reading.token_id(hf, "pad_token_id"),
        residual_in_fp32=reading.boolean(hf, "residual_in_fp32", default=True),
    )


def write(config: Config) -> dict[str, Any]:
    """config.json in the keys of transformers 4 and 5 (configuration_mamba2.py)."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **writing.mixers(config),
        "num_heads": config.mamba_n_heads,
        "head_dim": config.mamba_d_head,
        "n_groups": config.mamba_n_groups,
    }
