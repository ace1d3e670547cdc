"""What llama.cpp cannot represent of a model, checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from bamba_quant.errors import ArchitectureError
from bamba_reference.config import Config

_LLAMA_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp's src/llama-hparams.h

# Key, value found, whether llama.cpp supports it, and what it supports.
Requirement = tuple[str, Any, bool, str]


def common(config: Config, hidden_act: str = "silu") -> tuple[Requirement, ...]:
    """What llama.cpp requires of every model; its graph has this activation."""
    return (
        (
            "num_hidden_layers",
            config.num_hidden_layers,
            config.num_hidden_layers <= _LLAMA_MAX_LAYERS,
            f"at most {_LLAMA_MAX_LAYERS}",
        ),
        ("hidden_act", config.hidden_act, config.hidden_act == hidden_act, hidden_act),
    )


def mixer(config: Config) -> tuple[Requirement, ...]:
    """What llama.cpp's Mamba and Mamba-2 layers require."""
    low, high = config.time_step_limit
    return (
        (
            "mamba_conv_bias",
            config.mamba_conv_bias,
            config.mamba_conv_bias,
            "true (its graph always adds the bias)",
        ),
        ("mamba_proj_bias", config.mamba_proj_bias, not config.mamba_proj_bias, "false"),
        ("time_step_limit", [low, high], low <= 0 and math.isinf(high), "[0, Infinity]: no limit"),
    )


def expansion(config: Config) -> Requirement:
    """Of the architectures whose graph has mixers of twice the hidden size."""
    return ("mamba_expand", config.mamba_expand, config.mamba_expand == 2, "2")


def check(requirements: Collection[Requirement]) -> None:
    """Raise ``ArchitectureError`` for the first requirement that is not met."""
    for key, value, supported, expected in requirements:
        if not supported:
            raise ArchitectureError(
                f"llama.cpp cannot represent this model's {key}",
                where="config.json",
                found=f"{key} = {value}",
                expected=expected,
                fix="do not convert this model to GGUF; generate, perplexity and evaluate run the checkpoint itself",
            )
