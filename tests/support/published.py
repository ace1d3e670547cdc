"""Configurations of models that people have, key by key as they were published, for what follows from shapes alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model by its name on the Hub: its family, its config.json and its parameters as its makers count them.

    ``parameters`` is a decimal number with as many digits as were published.
    """

    family: str
    config: dict[str, Any]
    parameters: str

    def save(self, directory: Path) -> Path:
        """A directory with this config.json and nothing else."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=2))
        return directory


_GRANITE: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 100257, "embedding_multiplier": 12, "eos_token_id": 100257, "hidden_act": "silu",
    "init_method": "mup", "initializer_range": 0.1, "mamba_chunk_size": 256, "mamba_conv_bias": True,
    "mamba_d_conv": 4, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_proj_bias": False,
    "max_position_embeddings": 131072, "model_type": "granitemoehybrid", "normalization_function": "rmsnorm",
    "num_hidden_layers": 40, "output_router_logits": False, "pad_token_id": 100256, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.56.0", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
_HYBRID: dict[str, Any] = _GRANITE | {
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)], "mamba_d_head": 64,
    "position_embedding_type": "nope", "rope_theta": 10000,
}  # fmt: skip
_TIME_STEPS: dict[str, Any] = {
    "rescale_prenorm_residual": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
    "time_step_max": 0.1, "time_step_min": 0.001, "time_step_scale": 1.0,
}  # fmt: skip
_STATE_SPACES: dict[str, Any] = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
_STATE_SPACES_2: dict[str, Any] = _STATE_SPACES | {
    "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip
# NVIDIA's Megatron-Bridge has the sizes (models/nemotronh/nemotron_h_provider.py), llama.cpp and vLLM read these keys.
_NEMOTRON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig",
                 "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
    "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "hidden_dropout": 0.0,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu",
    "mamba_proj_bias": False, "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "n_groups": 8,
    "num_key_value_heads": 8, "num_logits_to_keep": 1, "pad_token_id": 0, "rescale_prenorm_residual": True,
    "residual_in_fp32": False, "sliding_window": None, "tie_word_embeddings": False, "time_step_floor": 0.0001,
    "time_step_max": 0.1, "time_step_min": 0.001, "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True,
    "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip
_NEMOTRON_8K: dict[str, Any] = _NEMOTRON | {
    "attention_head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
    "time_step_limit": [0.0, math.inf], "time_step_rank": 256, "transformers_version": "4.48.0.dev0",
}  # fmt: skip

# As the tests of NVIDIA-NeMo/Megatron-Bridge for its falcon_h1 have it of Falcon-H1-0.5B. Of the larger models the
# sizes were found (transformers' docs, model_doc/falcon_h1.md; widths of feed-forward networks in public
# configurations or, of 1.5B-Deep, 3B and 34B, by the number of weights; the norm of 3B by that number, of 7B by what
# loads Falcon-H1R-7B, of 34B by a GGUF's keys in tiiuae/llama.cpp-Falcon-H1) but not the multipliers, which change no
# shape.
_FALCON_H1: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "attn_layer_indices": None,
    "embedding_multiplier": 5.656854249492381, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 2048, "key_multiplier": 0.39062499999999994,
    "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_d_head": 64, "mamba_d_ssm": 1536, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 24, "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": False,
    "mamba_use_mlp": True, "max_position_embeddings": 16384, "mlp_bias": False,
    "mlp_multipliers": [0.8838834764831844, 0.5859375], "model_type": "falcon_h1", "num_attention_heads": 8,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "projectors_bias": False, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32784,
}  # fmt: skip
_FALCON_H1_128: dict[str, Any] = _FALCON_H1 | {
    "head_dim": 128, "mamba_d_state": 256, "max_position_embeddings": 131072, "vocab_size": 65537,
}  # fmt: skip

PUBLISHED = {
    "nvidia/Nemotron-H-8B-Base-8K": Published(
        "nemotron_h",
        _NEMOTRON_8K | {
            "hidden_size": 4096, "intermediate_size": 21504, "mamba_num_heads": 128, "num_attention_heads": 32,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            "num_hidden_layers": 52, "ssm_state_size": 128,
        },
        "8.1e9",
    ),
    "nvidia/Nemotron-H-47B-Base-8K": Published(
        "nemotron_h",
        _NEMOTRON_8K | {
            "hidden_size": 8192, "intermediate_size": 30720, "mamba_num_heads": 256, "num_attention_heads": 64,
            "hybrid_override_pattern": "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---M"
            "M---M-M*-M-M-M-M-M-",
            "num_hidden_layers": 98, "ssm_state_size": 256,
        },
        "46.8e9",
    ),
    "nvidia/Nemotron-H-56B-Base-8K": Published(
        "nemotron_h",
        _NEMOTRON_8K | {
            "hidden_size": 8192, "intermediate_size": 32768, "mamba_num_heads": 256, "num_attention_heads": 64,
            "hybrid_override_pattern": "M-M-M-M" + "*-M-M-M-M-M" * 10 + "-",
            "num_hidden_layers": 118, "ssm_state_size": 256,
        },
        "56e9",
    ),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": Published(
        "nemotron_h",
        _NEMOTRON | {
            "head_dim": 128, "hidden_size": 4480, "intermediate_size": 15680, "mamba_head_dim": 80,
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            "mamba_num_heads": 128, "max_position_embeddings": 131072, "num_attention_heads": 40,
            "num_hidden_layers": 56, "rms_norm_eps": 1e-05, "ssm_state_size": 128,
            "time_step_limit": [0.0, math.inf], "transformers_version": "4.51.3",
        },
        "8.89e9",
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Published(
        "nemotron_h",
        _NEMOTRON | {
            "head_dim": 128, "hidden_size": 2688, "intermediate_size": 1856, "mamba_num_heads": 64,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
            "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
            "num_hidden_layers": 52, "num_key_value_heads": 2, "partial_rotary_factor": 1.0, "rope_theta": 10000,
            "routed_scaling_factor": 2.5, "ssm_state_size": 128, "topk_group": 1, "transformers_version": "4.55.4",
        },
        "31.6e9",
    ),
    "ibm-granite/granite-4.0-h-micro": Published(
        "granitemoehybrid",
        _HYBRID | {
            "attention_multiplier": 0.015625, "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8,
            "mamba_n_heads": 64, "num_attention_heads": 32, "num_experts_per_tok": 0, "num_key_value_heads": 8,
            "num_local_experts": 0, "shared_intermediate_size": 8192,
        },
        "3.19e9",
    ),
    "ibm-granite/granite-4.0-h-tiny": Published(
        "granitemoehybrid",
        _HYBRID | {
            "attention_multiplier": 0.0078125, "hidden_size": 1536, "intermediate_size": 512, "logits_scaling": 6,
            "mamba_n_heads": 48, "num_attention_heads": 12, "num_experts_per_tok": 6, "num_key_value_heads": 4,
            "num_local_experts": 64, "shared_intermediate_size": 1024,
        },
        "6.94e9",
    ),
    "ibm-granite/granite-4.0-h-small": Published(
        "granitemoehybrid",
        _HYBRID | {
            "attention_multiplier": 0.0078125, "hidden_size": 4096, "intermediate_size": 768, "logits_scaling": 16,
            "mamba_n_heads": 128, "num_attention_heads": 32, "num_experts_per_tok": 10, "num_key_value_heads": 8,
            "num_local_experts": 72, "shared_intermediate_size": 1536,
        },
        "32.2e9",
    ),
    "ibm-granite/granite-4.0-micro": Published(
        "granitemoehybrid",
        _GRANITE | {
            "attention_multiplier": 0.015625, "hidden_size": 2560, "intermediate_size": 8192,
            "layer_types": ["attention"] * 40, "logits_scaling": 10, "mamba_d_head": 40, "mamba_d_state": 256,
            "mamba_n_heads": 128, "num_attention_heads": 40, "num_experts_per_tok": 0, "num_key_value_heads": 8,
            "num_local_experts": 0, "position_embedding_type": "rope", "rope_theta": 10000000,
            "shared_intermediate_size": 8192,
        },
        "3.40e9",
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": Published(
        "mamba2",
        _TIME_STEPS | {
            "_name_or_path": "/raid/pablo/codestral-hf-good/", "architectures": ["Mamba2ForCausalLM"],
            "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "intermediate_size": 8192,
            "layer_norm_epsilon": 1e-05, "model_type": "mamba2", "n_groups": 8, "norm_before_gate": True,
            "num_heads": 128, "num_hidden_layers": 64, "pad_token_id": 0, "residual_in_fp32": True, "rms_norm": True,
            "state_size": 128, "tie_word_embeddings": False, "time_step_limit": [0.0, math.inf],
            "time_step_rank": 256, "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0",
            "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 32768,
        },
        "7285403648",
    ),
    "state-spaces/mamba2-2.7b": Published("mamba2", _STATE_SPACES_2 | {"d_model": 2560, "n_layer": 64}, "2.7e9"),
    "state-spaces/mamba2-130m": Published("mamba2", _STATE_SPACES_2, "1.3e8"),
    "state-spaces/mamba-2.8b": Published("mamba", _STATE_SPACES | {"d_model": 2560, "n_layer": 64}, "2.8e9"),
    "state-spaces/mamba-130m-hf": Published(
        "mamba",
        _STATE_SPACES | _TIME_STEPS | {
            "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
            "eos_token_id": 0, "expand": 2, "hidden_act": "silu", "hidden_size": 768, "initializer_range": 0.1,
            "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba", "num_hidden_layers": 24,
            "pad_token_id": 0, "state_size": 16, "time_step_rank": 48, "torch_dtype": "float32",
            "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
            "vocab_size": 50280,
        },
        "129e6",
    ),
    # As transformers has it (configuration_jamba.py, docs/source/en/model_doc/jamba.md), and Jamba Mini 1.5 to 1.7.
    "ai21labs/Jamba-v0.1": Published(
        "jamba",
        {
            "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
            "attn_layer_period": 8, "bos_token_id": 1, "eos_token_id": 2, "expert_layer_offset": 1,
            "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
            "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_proj_bias": False, "max_position_embeddings": 262144,
            "model_type": "jamba", "num_attention_heads": 32, "num_experts": 16, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1, "output_router_logits": False,
            "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_mamba_kernels": True,
            "vocab_size": 65536,
        },
        "52e9",
    ),
    "tiiuae/falcon-mamba-7b": Published(
        "falcon_mamba",
        _TIME_STEPS | {
            "_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
            "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
            "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba",
            "num_hidden_layers": 64, "pad_token_id": 11, "residual_in_fp32": True, "state_size": 16,
            "tie_word_embeddings": False, "time_step_rank": 256, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
            "vocab_size": 65024,
        },
        "7.27e9",
    ),
    "tiiuae/Falcon-H1-0.5B-Base": Published("falcon_h1", _FALCON_H1, "5.21e8"),
    "tiiuae/Falcon-H1-1.5B-Base": Published(
        "falcon_h1",
        _FALCON_H1_128 | {
            "hidden_size": 2048, "intermediate_size": 4608, "mamba_d_ssm": 3072, "mamba_n_heads": 48,
            "num_hidden_layers": 24,
        },
        "1.55e9",
    ),
    "tiiuae/Falcon-H1-1.5B-Deep-Base": Published(
        "falcon_h1",
        _FALCON_H1_128 | {
            "hidden_size": 1280, "intermediate_size": 3072, "num_attention_heads": 6, "num_hidden_layers": 66,
        },
        "1.55e9",
    ),
    "tiiuae/Falcon-H1-3B-Base": Published(
        "falcon_h1",
        _FALCON_H1_128 | {
            "hidden_size": 2560, "intermediate_size": 6144, "mamba_d_head": 128, "mamba_d_ssm": 4096,
            "mamba_n_heads": 32, "mamba_rms_norm": True, "num_attention_heads": 10, "num_hidden_layers": 32,
        },
        "3.1494e9",
    ),
    "tiiuae/Falcon-H1-7B-Base": Published(
        "falcon_h1",
        _FALCON_H1_128 | {
            "hidden_size": 3072, "intermediate_size": 12288, "mamba_d_head": 128, "mamba_d_ssm": 3072,
            "mamba_rms_norm": True, "max_position_embeddings": 262144, "num_attention_heads": 12,
            "num_hidden_layers": 44, "vocab_size": 130048,
        },
        "7.59e9",
    ),
    "tiiuae/Falcon-H1-34B-Base": Published(
        "falcon_h1",
        _FALCON_H1_128 | {
            "hidden_size": 5120, "intermediate_size": 21504, "mamba_d_head": 128, "mamba_d_ssm": 4096,
            "mamba_n_groups": 2, "mamba_n_heads": 32, "mamba_rms_norm": True, "max_position_embeddings": 262144,
            "num_attention_heads": 20, "num_hidden_layers": 72, "num_key_value_heads": 4, "vocab_size": 261120,
        },
        "33.6e9",
    ),
}  # fmt: skip
