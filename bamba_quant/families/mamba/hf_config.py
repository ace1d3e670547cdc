"""Reads the selective scan's configurations: ``MambaForCausalLM``, ``FalconMambaForCausalLM``, state-spaces' own.

Defaults are those of transformers' ``MambaConfig`` and ``FalconMambaConfig``, which state-spaces' ``Mamba`` shares.
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
    hidden_size intermediate_size num_hidden_layers state_size conv_kernel expand time_step_rank use_bias
    use_conv_bias hidden_act layer_norm_epsilon residual_in_fp32 tie_word_embeddings
    """.split()
)
FALCON_KEYS = KEYS | {"mixer_rms_eps"}

# How dt was drawn before training, and which of several equal scans and losses is run.
INERT = state_spaces.INERT | frozenset(
    """
    time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme dt_rank
    rescale_prenorm_residual use_mambapy use_falcon_mambapy use_associative_scan fuse_norm fuse_cross_entropy
    """.split()
)

_SSM_KEYS = frozenset("d_state d_conv expand dt_rank bias conv_bias".split())


def read(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    """Mamba's."""
    reading.refuse_unknown_keys(
        hf, KEYS | INERT, ignore, "transformers' MambaConfig and state-spaces' MambaConfig"
    )
    return _read(hf, ignore, None)


def read_falcon(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    """FalconMamba's: Mamba with norms on dt, B and C."""
    reading.refuse_unknown_keys(hf, FALCON_KEYS | INERT, ignore, "transformers' FalconMambaConfig")
    return _read(hf, ignore, reading.positive("mixer_rms_eps", hf.get("mixer_rms_eps"), default=1e-6))


def _read(hf: Mapping[str, Any], ignore: Collection[str], mixer_rms_eps: float | None) -> Config:
    spelled = state_spaces.spellings(hf, "Mamba1", _SSM_KEYS, ignore)
    count = reading.integer(*spelled.top("num_hidden_layers", "n_layer"), most=reading.MOST_LAYERS)
    hidden_size = reading.integer(*spelled.top("hidden_size", "d_model"))
    values, rank_key = spelled.ssm("time_step_rank", "dt_rank")
    rank = -(-hidden_size // 16)
    if values.get(rank_key, "auto") not in ("auto", None):
        rank = reading.integer(values, rank_key)
    return Config(
        vocab_size=spelled.vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=0,
        layers=single_block_layers(reading.alike("mamba1", count)),
        num_attention_heads=0,
        num_key_value_heads=0,
        head_dim=0,
        rotary_dim=0,
        rope_theta=10000.0,
        attention_bias=False,
        mlp_bias=False,
        hidden_act=reading.only_silu(hf),
        mamba_expand=_expand(spelled, hidden_size),
        mamba_n_heads=0,
        mamba_d_head=0,
        mamba_n_groups=0,
        mamba_d_state=reading.integer(*spelled.ssm("state_size", "d_state"), default=16),
        mamba_d_conv=reading.integer(*spelled.ssm("conv_kernel", "d_conv"), default=4),
        mamba_conv_bias=reading.boolean(*spelled.ssm("use_conv_bias", "conv_bias"), default=True),
        mamba_proj_bias=reading.boolean(*spelled.ssm("use_bias", "bias"), default=False),
        time_step_limit=reading.time_step_limit("time_step_limit", None),
        rms_norm_eps=reading.positive("layer_norm_epsilon", hf.get("layer_norm_epsilon"), default=1e-5),
        tie_word_embeddings=reading.boolean(
            *spelled.top("tie_word_embeddings", "tie_embeddings"), default=True
        ),
        max_position_embeddings=reading.NO_POSITIONS,
        bos_token_id=reading.token_id(hf, "bos_token_id"),
        eos_token_ids=reading.token_ids("eos_token_id", hf.get("eos_token_id")),
        pad_token_id=reading.token_id(hf, "pad_token_id"),
        mamba_time_step_rank=rank,
        mixer_rms_eps=mixer_rms_eps,
        residual_in_fp32=reading.boolean(hf, "residual_in_fp32", default=True),
    )


def _expand(spelled: state_spaces.Spellings, hidden_size: int) -> int:
    """``intermediate_size`` over ``hidden_size``: falcon-mamba-7b says expand 16, and its weights are 8192 wide.

    transformers reads ``expand`` and lets ``intermediate_size`` overrule it.
    """
    expand = reading.integer(*spelled.ssm("expand", "expand"), default=2)
    d_inner = reading.integer(spelled.hf, "intermediate_size", default=expand * hidden_size)
    widths = reading.quotient(d_inner, hidden_size, "intermediate_size", "hidden_size")
    if spelled.hf.get("d_inner") not in (None, d_inner):
        raise ConfigError(
            "d_inner is not the width of the mixer", found=repr_short(spelled.hf["d_inner"]), expected=d_inner
        )
    return widths


def write(config: Config) -> dict[str, Any]:
    """config.json in the keys of transformers 4 and 5 (configuration_mamba.py, configuration_falcon_mamba.py)."""
    falcon = config.mixer_rms_eps is not None
    written = {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        **writing.mixers(config),
        "intermediate_size": config.mamba_d_inner,
        "time_step_rank": config.mamba_time_step_rank,
    }
    return written | (
        {"mixer_rms_eps": writing.shortest(config.mixer_rms_eps)} if config.mixer_rms_eps else {}
    )
