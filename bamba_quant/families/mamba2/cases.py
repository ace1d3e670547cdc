"""Small Mamba-2 models for the tests."""

from typing import Any

from bamba_quant.families.small_models import MIXERS_ALONE, WIDE_MIXER, SmallModels


def _state_spaces(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": config.state_size,
            "headdim": config.head_dim,
            "ngroups": config.n_groups,
        },
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "tie_embeddings": config.tie_word_embeddings,
    }


SMALL_MODELS = SmallModels(
    transformers_class="Mamba2ForCausalLM",
    keys={**MIXERS_ALONE, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    cases={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "groups 2": {"n_groups": 2},
        "expanded four times": {"expand": 4, "num_heads": 16},
        "vocabulary of 161": {"vocab_size": 161},
        "large epsilon": {"layer_norm_epsilon": 3e-2},
    },
    reference_cases={
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
    # in_proj has 2 · 256 + 2 · 56 + 16 = 640 rows.
    multiples_of_128={"hidden_size": 128, "num_heads": 16, "state_size": 56},
    kinds=("tied",),
    state_spaces=_state_spaces,
    state_spaces_cases=("plain", "tied", "groups 2"),
    refused_by_gguf=(
        ({"use_bias": True}, "mamba_proj_bias"),
        ({"use_conv_bias": False}, "mamba_conv_bias"),
        ({"time_step_limit": (0.01, 0.1)}, "time_step_limit"),
    ),
    whole_blocks={"state_size": 64, "n_groups": 2, "num_heads": 128, "head_dim": 2},
    cut_blocks=(({"state_size": 128}, ""), ({"state_size": 32}, "ssm_in")),
    llama_quantize={"mamba2": {**WIDE_MIXER, "num_heads": 8, "head_dim": 64, "n_groups": 2}},
)
