"""Mamba (transformers' and state-spaces' own checkpoints) and FalconMamba, which llama.cpp runs as ``mamba``.

Sources: transformers' modeling_mamba.py and modeling_falcon_mamba.py, mamba_ssm's mixer_seq_simple.py for the
left-hand names; llama.cpp's src/models/mamba.cpp and gguf-py's tensor_mapping.py for the right-hand ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from bamba_quant.checkpoint.gguf_values import boolean, float32, uint32
from bamba_quant.families import keys
from bamba_quant.families import limitations as refusals
from bamba_quant.families.gguf_reader import Reader
from bamba_quant.families.rows import (
    BLOCK,
    EMBEDDINGS,
    LAYER,
    MIXER_DIALECTS,
    convolution,
    convolution_in_gguf,
    has_convolution_bias,
    has_projection_bias,
    hidden,
    inner,
    projected_in,
    projected_out,
)
from bamba_quant.families.rules import (
    Architecture,
    Metadata,
    Rule,
    Tensors,
    Values,
    architecture_named,
    register,
    spelled,
)
from bamba_quant.families.runtime_compat import Loaders
from bamba_quant.families.transforms import NEGATIVE_EXP, Transform, power_of_two
from bamba_reference.config import Config


def _selected(config: Config) -> tuple[int, int]:
    return (config.mamba_time_step_rank + 2 * config.mamba_d_state, config.mamba_d_inner)


def _states(config: Config) -> tuple[int, int]:
    return (config.mamba_d_inner, config.mamba_d_state)


def _epsilon_exponent(config: Config) -> int:
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
    return power_of_two(_epsilon_exponent(config))


def _decay(config: Config) -> Transform:
    # Its inverse finds out what type the values had, from all of them.
    return replace(NEGATIVE_EXP, rows=config.mamba_d_inner)


# fmt: off
_MAMBA = (
    # Rows of in_proj, in order: x, z.
    Rule(LAYER + "mamba.in_proj.weight", BLOCK + "ssm_in.weight", "ssm_in", projected_in),
    Rule(LAYER + "mamba.in_proj.bias", None, "bias", lambda c: projected_in(c)[:1], when=has_projection_bias),
    Rule(LAYER + "mamba.conv1d.weight", BLOCK + "ssm_conv1d.weight", "ssm_conv1d", convolution,
         gguf_shape=convolution_in_gguf),
    Rule(LAYER + "mamba.conv1d.bias", BLOCK + "ssm_conv1d.bias", "bias", inner, when=has_convolution_bias),
    # Rows of x_proj, in order: dt's, B, C.
    Rule(LAYER + "mamba.x_proj.weight", BLOCK + "ssm_x.weight", "ssm_x", _selected,
         transform=_balanced),
    Rule(LAYER + "mamba.dt_proj.weight", BLOCK + "ssm_dt.weight", "ssm_dt_proj",
         lambda c: (c.mamba_d_inner, c.mamba_time_step_rank)),
    Rule(LAYER + "mamba.dt_proj.bias", BLOCK + "ssm_dt.bias", "ssm_dt", inner),
    Rule(LAYER + "mamba.A_log", BLOCK + "ssm_a", "ssm_a", _states, transform=_decay),
    Rule(LAYER + "mamba.D", BLOCK + "ssm_d", "ssm_d", inner),
    Rule(LAYER + "mamba.out_proj.weight", BLOCK + "ssm_out.weight", "ssm_out", projected_out),
    Rule(LAYER + "mamba.out_proj.bias", None, "bias", hidden, when=has_projection_bias),
)
# fmt: on
RULES = spelled(EMBEDDINGS + _MAMBA, *MIXER_DIALECTS)

_NORMED = "ssm.dt_b_c_rms"
# llama.cpp has no such key and passes it over; a file without it has ssm_x as the checkpoint has it.
_NORMED_EPSILON = "ssm.dt_b_c_rms_epsilon"


def _is_falcon(values: Values) -> bool:
    return values.flag(f"{architecture_named(values)}.{_NORMED}") or False


def _gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp reads for ``mamba`` (mamba.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    written = {
        **keys.shape(config),
        **keys.NO_ATTENTION,
        "ssm.conv_kernel": uint32(config.mamba_d_conv),
        "ssm.inner_size": uint32(config.mamba_d_inner),
        "ssm.state_size": uint32(config.mamba_d_state),
        "ssm.time_step_rank": uint32(config.mamba_time_step_rank),
        _NORMED: boolean(config.mixer_rms_eps is not None),
    }
    return written | ({_NORMED_EPSILON: float32(config.mixer_rms_eps)} if config.mixer_rms_eps else {})


def _check_gguf(config: Config) -> tuple[str, ...]:
    """What llama.cpp's graph for ``mamba`` has no place for (``ArchitectureError``), and what it does otherwise."""
    refusals.refuse((refusals.expansion(config), *refusals.mixer(config), *refusals.common(config)))
    if config.mixer_rms_eps in (None, config.rms_norm_eps):
        return ()
    exponent = _epsilon_exponent(config)
    return (
        f"llama.cpp norms dt, B and C with the model's epsilon, {config.rms_norm_eps:g}, and not with the mixer's, "
        f"{config.mixer_rms_eps:g}; ssm_x is stored times 2^{exponent}, under which it acts like "
        f"{config.rms_norm_eps / 4**exponent:.3g}",
    )


def _config_of_gguf(values: Values, tensors: Tensors) -> Config:
    """``_gguf_metadata`` read back; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    read = Reader(values, tensors)
    shape = read.shape()
    return Config(
        **shape,
        **keys.ONLY_MIXERS,
        **read.layers("mamba1"),
        mamba_expand=read.expansion(),
        mamba_n_heads=0,
        mamba_d_head=0,
        mamba_n_groups=0,
        mamba_d_state=read.count("ssm.state_size"),
        mamba_d_conv=read.count("ssm.conv_kernel"),
        mamba_conv_bias=read.has_convolution_bias(),
        mamba_proj_bias=False,
        time_step_limit=(0.0, math.inf),
        mamba_time_step_rank=read.count("ssm.time_step_rank"),
        mixer_rms_eps=read.positive(_NORMED_EPSILON, shape["rms_norm_eps"]) if _is_falcon(values) else None,
    )


def _hf_config(config: Config) -> dict[str, Any]:
    """config.json in the keys of transformers 4 and 5 (configuration_mamba.py, configuration_falcon_mamba.py)."""
    falcon = config.mixer_rms_eps is not None
    written = {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        **keys.hf_mixers(config),
        "intermediate_size": config.mamba_d_inner,
        "time_step_rank": config.mamba_time_step_rank,
    }
    return written | ({"mixer_rms_eps": keys.shortest(config.mixer_rms_eps)} if config.mixer_rms_eps else {})


MAMBA = register(
    Architecture(
        name="mamba",
        hf_architectures=("MambaForCausalLM",),
        gguf_architectures=("mamba",),
        rules=RULES,
        gguf_metadata=_gguf_metadata,
        check_gguf=_check_gguf,
        config_of_gguf=_config_of_gguf,
        hf_config=_hf_config,
        reads_gguf=lambda values: not _is_falcon(values),
        # vLLM's MambaMixer makes every layer without a quantization (layers/mamba/mamba_mixer.py).
        loaders=Loaders(vllm=None, initialized=frozenset({"ssm_out"})),
    )
)
FALCON_MAMBA = register(
    replace(
        MAMBA,
        name="falcon_mamba",
        hf_architectures=("FalconMambaForCausalLM",),
        reads_gguf=_is_falcon,
    )
)
