"""Small Falcon-H1 models for the tests."""

from bamba_quant.families.small_models import SPECIAL_TOKENS, Keys, SmallModels

# Powers of two, so that folding is exact, and those of one block differ, so that none can be taken for another. Those
# folded into matrices are at least 1 here: others lose bits of the smallest numbers of float16.
_POWERS_OF_TWO: Keys = {
    "embedding_multiplier": 4.0,
    "lm_head_multiplier": 2.0,
    "attention_in_multiplier": 2.0,
    "attention_out_multiplier": 4.0,
    "key_multiplier": 0.5,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 8.0,
    "ssm_multipliers": [4.0, 0.5, 0.25, 8.0, 2.0],
    "mlp_multipliers": [2.0, 4.0],
}
_BELOW_ONE: Keys = {
    "lm_head_multiplier": 0.125,
    "attention_out_multiplier": 0.5,
    "key_multiplier": 0.25,
    "ssm_in_multiplier": 2.0,
    "ssm_out_multiplier": 0.25,
    "ssm_multipliers": [0.25, 1.0, 0.5, 2.0, 0.125],
    "mlp_multipliers": [0.5, 0.25],
}
# Those of tiiuae/Falcon-H1-0.5B-Base.
_PUBLISHED: Keys = {
    "embedding_multiplier": 5.656854249492381,
    "lm_head_multiplier": 0.0390625,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.9375,
    "key_multiplier": 0.39062499999999994,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.23570226039551587,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
}
_ROPE: Keys = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e11}}

# An attention output of half the model's width, and a mixer of three times it.
_WIDE: Keys = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "mamba_d_ssm": 768, "mamba_n_heads": 12, "mamba_d_head": 64,
    "vocab_size": 64,
}  # fmt: skip

SMALL_MODELS = SmallModels(
    transformers_class="FalconH1ForCausalLM",
    keys={
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": False,
        **_POWERS_OF_TWO,
        **SPECIAL_TOKENS,
    },
    cases={
        "plain": _ROPE,
        "tied, norm, groups 2, biases": {
            "tie_word_embeddings": True,
            "mamba_rms_norm": True,
            "mamba_n_groups": 2,
            "mlp_bias": True,
            **_BELOW_ONE,
        },
    },
    reference_cases={
        "falcon h1": {**_PUBLISHED, **_ROPE},
        "falcon h1, tied, norm, two groups, short convolution, finite limit": {
            **_PUBLISHED,
            "tie_word_embeddings": True,
            "mamba_rms_norm": True,
            "mamba_n_groups": 2,
            "mamba_d_conv": 2,
            "head_dim": 8,
            "time_step_limit": (0.01, 0.1),
        },
        "falcon h1, every bias": {
            **_PUBLISHED,
            "attention_in_multiplier": 1.5,
            "ssm_out_multiplier": 1.5,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
        },
    },
    # in_proj has 2 · 256 + 2 · 56 + 16 = 640 rows.
    multiples_of_128={
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "mamba_d_ssm": 256,
        "mamba_n_heads": 16,
        "mamba_d_state": 56,
    },
    whole_blocks={"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128, "mamba_d_head": 2},
    cut_blocks=(
        ({"mamba_d_state": 128, "num_key_value_heads": 1}, "attn_k"),
        ({"mamba_d_state": 64}, "ssm_in"),
    ),
    llama_quantize={"falcon_h1": _WIDE},
)
