"""Keys of config.json that several families share, as they are written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bamba_reference.config import Config


def special_tokens(config: Config) -> dict[str, Any]:
    """Written even where there is none: transformers' defaults are other ids."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def mamba2(config: Config) -> dict[str, Any]:
    """Mamba-2 layers in the keys of Bamba and Granite."""
    return {
        "mamba_expand": config.mamba_expand,
        "mamba_n_heads": config.mamba_n_heads,
        "mamba_d_head": config.mamba_d_head,
        "mamba_n_groups": config.mamba_n_groups,
        "mamba_d_state": config.mamba_d_state,
        "mamba_d_conv": config.mamba_d_conv,
        "mamba_conv_bias": config.mamba_conv_bias,
        "mamba_proj_bias": config.mamba_proj_bias,
        **_time_step_limit(config),
    }


def _time_step_limit(config: Config) -> dict[str, Any]:
    return (
        {} if config.time_step_limit == (0.0, math.inf) else {"time_step_limit": list(config.time_step_limit)}
    )


def mixers(config: Config) -> dict[str, Any]:
    """A model of mixers alone in the keys that Mamba, FalconMamba and Mamba-2 share."""
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "state_size": config.mamba_d_state,
        "conv_kernel": config.mamba_d_conv,
        "expand": config.mamba_expand,
        "use_bias": config.mamba_proj_bias,
        "use_conv_bias": config.mamba_conv_bias,
        "hidden_act": config.hidden_act,
        "layer_norm_epsilon": shortest(config.rms_norm_eps),
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_tokens(config),
        "use_cache": True,
    }
    return written | _time_step_limit(config)


def attention(config: Config) -> dict[str, Any]:
    """Attention layers, but for their rotary embedding."""
    written: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": config.attention_bias,
        "rope_theta": shortest(config.rope_theta),
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.head_dim
    return written


def shortest(number: float) -> float:
    """The shortest decimal among those a file's float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
