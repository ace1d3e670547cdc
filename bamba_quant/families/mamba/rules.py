"""The tensors of Mamba and FalconMamba.

Sources: transformers' modeling_mamba.py and modeling_falcon_mamba.py, mamba_ssm's mixer_seq_simple.py for the names
in checkpoints; gguf-py's tensor_mapping.py for those in GGUF.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bamba_quant.families.rules import Rule, renamed
from bamba_quant.families.shared_rules import (
    BLOCK,
    EMBEDDINGS,
    LAYER,
    MIXER_NAMES,
    convolution,
    convolution_in_gguf,
    has_convolution_bias,
    has_projection_bias,
    hidden,
    inner,
    of_block,
    projected_in,
    projected_out,
)
from bamba_quant.families.transforms import NEGATIVE_EXP, Transform, power_of_two
from bamba_reference.config import Config


def _selected(config: Config) -> tuple[int, int]:
    return (config.mamba_time_step_rank + 2 * config.mamba_d_state, config.mamba_d_inner)


def _states(config: Config) -> tuple[int, int]:
    return (config.mamba_d_inner, config.mamba_d_state)


def epsilon_exponent(config: Config) -> int:
    """k for which rows of x_proj times 2^k make llama.cpp's epsilon act like the mixer's own.

    llama.cpp norms dt, B and C with the model's epsilon e. Of rows times c, x c / sqrt(c^2 m + e) is what the norm
    of the rows themselves is under e / c^2; 2^2k comes within a factor of two of e over the mixer's epsilon. As
    GGUF keeps them, in float32.
    """
    if config.mixer_rms_eps is None:
        return 0
    ratio = np.float32(config.rms_norm_eps) / np.float32(config.mixer_rms_eps)
    return round(math.log2(ratio) / 2)


def _balanced(config: Config) -> Transform:
    return power_of_two(epsilon_exponent(config))


def _decay(config: Config) -> Transform:
    # Its inverse finds out what type the values had, from all of them.
    return replace(NEGATIVE_EXP, unit=config.mamba_d_inner)


# fmt: off
_MAMBA = of_block(
    "mamba1",
    Rule(LAYER + "mamba.in_proj.weight", BLOCK + "ssm_in.weight", "ssm_in", projected_in,
         row_sections=lambda c: {"x": c.mamba_d_inner, "z": c.mamba_d_inner}),
    Rule(LAYER + "mamba.in_proj.bias", None, "bias", lambda c: projected_in(c)[:1], when=has_projection_bias),
    Rule(LAYER + "mamba.conv1d.weight", BLOCK + "ssm_conv1d.weight", "ssm_conv1d", convolution,
         gguf_shape=convolution_in_gguf),
    Rule(LAYER + "mamba.conv1d.bias", BLOCK + "ssm_conv1d.bias", "bias", inner, when=has_convolution_bias),
    Rule(LAYER + "mamba.x_proj.weight", BLOCK + "ssm_x.weight", "ssm_x", _selected,
         transform=_balanced,
         row_sections=lambda c: {"dt": c.mamba_time_step_rank, "B": c.mamba_d_state, "C": c.mamba_d_state}),
    Rule(LAYER + "mamba.dt_proj.weight", BLOCK + "ssm_dt.weight", "ssm_dt_proj",
         lambda c: (c.mamba_d_inner, c.mamba_time_step_rank)),
    Rule(LAYER + "mamba.dt_proj.bias", BLOCK + "ssm_dt.bias", "ssm_dt", inner),
    Rule(LAYER + "mamba.A_log", BLOCK + "ssm_a", "ssm_a", _states, transform=_decay),
    Rule(LAYER + "mamba.D", BLOCK + "ssm_d", "ssm_d", inner),
    Rule(LAYER + "mamba.out_proj.weight", BLOCK + "ssm_out.weight", "ssm_out", projected_out),
    Rule(LAYER + "mamba.out_proj.bias", None, "bias", hidden, when=has_projection_bias),
)
# fmt: on
RULES = renamed(EMBEDDINGS + _MAMBA, *MIXER_NAMES)
