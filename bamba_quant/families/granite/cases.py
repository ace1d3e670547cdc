"""Small Granite 4.0 models for the tests."""

from bamba_quant.families.small_models import SPECIAL_TOKENS, Keys, SmallModels

_EXPERTS: Keys = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}
_ATTENTION_ONLY: Keys = {"layer_types": ["attention"] * 4}
_WIDE: Keys = {
    "hidden_size": 256, "shared_intermediate_size": 256, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 1, "mamba_d_head": 64, "vocab_size": 64,
    "layer_types": ["mamba", "attention"],
}  # fmt: skip
_ROTATED_ALONE: Keys = {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}
# Sixteen layers; experts and their neighbour share a count.
_DEEP: Keys = {
    **_WIDE, "num_hidden_layers": 16, "layer_types": ["attention", *["mamba", "attention", "attention"] * 5],
    "num_experts_per_tok": 1, "intermediate_size": 256,
}  # fmt: skip

SMALL_MODELS = SmallModels(
    transformers_class="GraniteMoeHybridForCausalLM",
    keys={
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "shared_intermediate_size": 96,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "max_position_embeddings": 4096,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
        "position_embedding_type": "nope",
        **SPECIAL_TOKENS,
    },
    cases={
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "groups 2": {"mamba_n_groups": 2},
        "rotary": {"position_embedding_type": "rope", "attention_bias": True},
        "vocabulary of 161": {"vocab_size": 161},
        "six experts": _EXPERTS,
        "one expert": {**_EXPERTS, "num_local_experts": 1, "num_experts_per_tok": 1},
        "eight experts, tied": {**_EXPERTS, "num_local_experts": 8, "tie_word_embeddings": True},
        "attention alone": {**_ATTENTION_ONLY, "position_embedding_type": "rope"},
        "attention alone, no rotary": _ATTENTION_ONLY,
        "attention alone, experts": {
            **_ATTENTION_ONLY,
            **_EXPERTS,
            "position_embedding_type": "rope",
        },
    },
    reference_cases={
        "granite": {},
        "granite, experts": {**_EXPERTS, "num_experts_per_tok": 3},
        "granite, tied, two groups, rotary, one expert of many": {
            "tie_word_embeddings": True,
            "mamba_n_groups": 2,
            "position_embedding_type": "rope",
            **_EXPERTS,
            "num_local_experts": 9,
            "num_experts_per_tok": 1,
        },
        "granite, attention alone, rotary, biases": {
            **_ATTENTION_ONLY,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
        "granite, attention alone, every expert": {
            **_ATTENTION_ONLY,
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
    # in_proj has 2 · 256 + 2 · 56 + 16 = 640 rows.
    multiples_of_128={
        "hidden_size": 128,
        "intermediate_size": 128,
        "shared_intermediate_size": 128,
        "num_key_value_heads": 4,
        "mamba_n_heads": 16,
        "mamba_d_state": 56,
    },
    kinds=("plain", "attention alone", "six experts"),
    refused_by_gguf=(
        ({"layer_types": ["mamba"] * 4}, "layer_types"),
        ({**_ATTENTION_ONLY, "num_local_experts": 4, "num_experts_per_tok": 2}, "position_embedding_type"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias"),
        ({"time_step_limit": (0.01, 0.1)}, "time_step_limit"),
    ),
    whole_blocks={"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128, "mamba_d_head": 2},
    cut_blocks=(
        ({"mamba_d_state": 128}, ""),
        ({"mamba_d_state": 128, "num_key_value_heads": 1}, "attn_k"),
        ({"mamba_d_state": 128, "shared_intermediate_size": 192}, "ffn_gate"),
        ({"mamba_d_state": 128, "shared_intermediate_size": 192, **_EXPERTS}, "ffn_gate_shexp"),
        ({"mamba_d_state": 64}, "ssm_in"),
    ),
    llama_quantize={
        "granite, eight experts": {**_WIDE, "num_local_experts": 8, "num_experts_per_tok": 2},
        "granite, attention alone, tied": {**_WIDE, **_ROTATED_ALONE, "tie_word_embeddings": True},
    },
    llama_quantize_by_layer={
        "granite, dense": _DEEP,
        "granite, one expert": {**_DEEP, "num_local_experts": 1},
        "granite, two experts": {**_DEEP, "num_local_experts": 2},
    },
)
