"""The random models of every family that the reference's tests run over, under the reference's names.

What a configuration may say that changes the mathematics stands here at least once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tests.support.families import FAMILIES

_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32}
_MAMBA: dict[str, dict[str, Any]] = {
    "": {},
    ", untied, rank 7": {"tie_word_embeddings": False, "time_step_rank": 7, "layer_norm_epsilon": 1e-3},
    ", biases, state 5": {"use_bias": True, "use_conv_bias": False, "state_size": 5, "expand": 3},
    ", stream in the model's dtype": {"residual_in_fp32": False, "conv_kernel": 2},
}

# Family -> name of a case -> keys of transformers' configuration.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "bamba": {
        "plain": {},
        "two groups, finite limit": {"mamba_n_groups": 2, "time_step_limit": (0.01, 0.1)},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "every bias but the convolution's": {
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
        "four groups, two attention layers": {
            "mamba_n_groups": 4,
            "attn_layer_indices": [0, 3],
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            "rms_norm_eps": 1e-3,
        },
        "no attention, short convolution": {
            "attn_layer_indices": None,
            "mamba_d_conv": 2,
            "mamba_d_state": 24,
        },
    },
    "granitemoehybrid": {
        "granite": {},
        "granite, experts": _EXPERTS,
        "granite, tied, two groups, rotary, one expert of many": {
            "tie_word_embeddings": True,
            "mamba_n_groups": 2,
            "position_embedding_type": "rope",
            **_EXPERTS,
            "num_local_experts": 9,
            "num_experts_per_tok": 1,
        },
        "granite, attention alone, rotary, biases": {
            "layer_types": ["attention"] * 4,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
        "granite, attention alone, every expert": {
            "layer_types": ["attention"] * 4,
            "position_embedding_type": None,
            **_EXPERTS,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
        "granite, projection biases, finite limit": {
            "mamba_proj_bias": True,
            "time_step_limit": (0.01, 0.1),
            "rms_norm_eps": 1e-3,
        },
    },
    "mamba2": {
        "mamba2": {},
        "mamba2, tied, two groups, finite limit": {
            "tie_word_embeddings": True,
            "n_groups": 2,
            "time_step_limit": (0.01, 0.1),
        },
        "mamba2, expanded four times, biases": {
            "expand": 4,
            "num_heads": 16,
            "use_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 1e-3,
        },
        "mamba2, stream in the model's dtype": {"residual_in_fp32": False, "conv_kernel": 2},
    },
    "mamba": {f"mamba{name}": keys for name, keys in _MAMBA.items()},
    "falcon_mamba": {f"falcon{name}": {"mixer_rms_eps": 1e-2, **keys} for name, keys in _MAMBA.items()},
}
FAMILY_OF = {name: family for family, cases in CASES.items() for name in cases}

# One case of each family, and one with experts.
REPRESENTATIVE = (*(next(iter(cases)) for cases in CASES.values()), "granite, experts")

# Cases whose mixers' projections have biases, and whose dt is bounded: transformers errs there
# (test_transformers_faults).
PROJECTION_BIASES = tuple(
    name
    for cases in CASES.values()
    for name, keys in cases.items()
    if keys.get("mamba_proj_bias") or keys.get("use_bias")
)
FINITE_LIMIT = tuple(
    name for cases in CASES.values() for name, keys in cases.items() if "time_step_limit" in keys
)


def random_model(name: str, seed: int) -> Any:
    """A float32 transformers model in eval mode."""
    family = FAMILY_OF[name]
    return FAMILIES[family].random(seed, **CASES[family][name])


_NAMES = (
    (r"^backbone\.embeddings\.", "model.embed_tokens."),
    (r"^backbone\.norm_f\.", "model.final_layernorm."),
    (r"^backbone\.(layers\.\d+)\.norm\.", r"model.\1.input_layernorm."),
    (r"^backbone\.(layers\.\d+)\.mixer\.", r"model.\1.mamba."),
    (r"^model\.norm\.", "model.final_layernorm."),
    (r"\.post_attention_layernorm\.", ".pre_ff_layernorm."),
    (r"\.shared_mlp\.output_linear\.", ".feed_forward.down_proj."),
    (r"\.block_sparse_moe\.router\.", ".moe.router."),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".moe.down_proj.weight"),
)
# Granite's gate and up projection are one tensor each; the second last dimension holds first the one, then the other.
_FUSED = (
    (r"\.shared_mlp\.input_linear\.weight$", ".feed_forward.{}_proj.weight"),
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".moe.{}_proj.weight"),
)


def own_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors, weights or their gradients, under the reference's names."""
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        for pattern, template in _FUSED:
            if re.search(pattern, name):
                for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
                    own[re.sub(pattern, template.format(part), name)] = half
                break
        else:
            own[name] = tensor
    return own
