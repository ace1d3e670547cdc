"""Small Jamba models for the tests."""

from bamba_quant.families.small_models import SPECIAL_TOKENS, Keys, SmallModels

_DENSE: Keys = {"num_experts": 1, "num_experts_per_tok": 1}
_WIDE: Keys = {
    "hidden_size": 256, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 1, "num_experts": 8, "attn_layer_period": 2,
    "expert_layer_offset": 0,
}  # fmt: skip

SMALL_MODELS = SmallModels(
    transformers_class="JambaForCausalLM",
    # Each kind of mixer once with experts and once without.
    keys={
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **SPECIAL_TOKENS,
    },
    cases={
        "plain": {},
        "dense, tied, rank 7, state 8": {
            **_DENSE,
            "tie_word_embeddings": True,
            "mamba_dt_rank": 7,
            "mamba_d_state": 8,
            "vocab_size": 161,
        },
        "eight experts in every layer": {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_offset": 0,
            "rms_norm_eps": 1e-2,
        },
    },
    reference_cases={
        "jamba": {"num_experts_per_tok": 3},
        "jamba, dense, tied, biases, wide heads": {
            **_DENSE,
            "tie_word_embeddings": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_expand": 3,
            "head_dim": 24,
            "rms_norm_eps": 1e-3,
        },
        "jamba, one expert of many, rank 5, state 3": {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "mamba_dt_rank": 5,
            "mamba_d_state": 3,
            "mamba_d_conv": 2,
            "num_key_value_heads": 1,
        },
    },
    multiples_of_128={"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4},
    refused_by_gguf=(({"head_dim": 24}, "head_dim"),),
    llama_quantize={"jamba, eight experts": _WIDE},
    llama_quantize_by_layer={
        "jamba, two experts in every second layer": {
            **_WIDE,
            "num_hidden_layers": 16,
            "num_experts": 2,
            "attn_layer_offset": 0,
            "intermediate_size": 256,
        }
    },
)
