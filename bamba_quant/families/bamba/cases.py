"""Small Bamba models for the tests."""

from bamba_quant.families.small_models import SPECIAL_TOKENS, SmallModels

SMALL_MODELS = SmallModels(
    transformers_class="BambaForCausalLM",
    keys={
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "max_position_embeddings": 4096,
        **SPECIAL_TOKENS,
    },
    cases={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "groups 2": {"mamba_n_groups": 2},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
    reference_cases={
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
    # in_proj has 2 · 256 + 2 · 56 + 16 = 640 rows.
    multiples_of_128={
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "mamba_n_heads": 16,
        "mamba_d_state": 56,
    },
    whole_blocks={"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128, "mamba_d_head": 2},
    # gate and up have whole blocks wherever down_proj's columns have.
    cut_blocks=(
        ({"mamba_d_state": 128, "num_key_value_heads": 4}, ""),
        ({"mamba_d_state": 128, "num_key_value_heads": 2}, "attn_k"),
        ({"mamba_d_state": 64, "num_key_value_heads": 4}, "ssm_in"),
    ),
)
