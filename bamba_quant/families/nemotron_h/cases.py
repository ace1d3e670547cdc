"""Small Nemotron-H models for the tests."""

from bamba_quant.families.small_models import SPECIAL_TOKENS, Keys, SmallModels

_EXPERTS: Keys = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}
_GROUPS: Keys = {**_EXPERTS, "n_group": 4, "topk_group": 2}
# Rows of experts that are a multiple of 32 and not of 256, as the 1856 and 3712 of Nemotron 3 Nano.
_WIDE: Keys = {
    "hidden_size": 256, "vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32,
    "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "layers_block_type": ["linear_attention", "moe", "full_attention"], "moe_intermediate_size": 928,
    "moe_shared_expert_intermediate_size": 480,
}  # fmt: skip
_DEEP: Keys = {
    **_WIDE, "intermediate_size": 256, "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
}  # fmt: skip
_LATENT: Keys = {**_EXPERTS, "moe_latent_size": 128, "norm_topk_prob": False, "n_groups": 1}

SMALL_MODELS = SmallModels(
    transformers_class="NemotronHForCausalLM",
    keys={
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "max_position_embeddings": 4096,
        # transformers raises each dt to this number, which NVIDIA's own code does not.
        "time_step_min": 1e-30,
        **SPECIAL_TOKENS,
    },
    cases={
        "plain": {"mlp_bias": True, "layer_norm_epsilon": 1e-3},
        "groups of experts": _GROUPS,
        "latent experts": _LATENT,
    },
    reference_cases={
        "nemotron": _GROUPS,
        "nemotron, biases": {
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 1e-3,
        },
        "nemotron, latent experts beside networks": {
            **_LATENT,
            "layers_block_type": ["moe", "linear_attention", "mlp", "full_attention", "moe"],
            "intermediate_size": 56,
        },
    },
    # in_proj has 2 · 256 + 2 · 2 · 28 + 16 = 640 rows.
    multiples_of_128={
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 128,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "mamba_num_heads": 16,
        "ssm_state_size": 28,
    },
    kinds=("plain", "groups of experts"),
    refused_by_gguf=(
        (
            {
                "layers_block_type": ["linear_attention", "mlp", "moe", "full_attention"],
                "intermediate_size": 56,
            },
            "layers_block_type",
        ),
        ({"layers_block_type": ["linear_attention", "mlp"]}, "layers_block_type"),
        ({"layers_block_type": ["linear_attention", "moe", "full_attention"], "mlp_bias": True}, "mlp_bias"),
        ({"use_bias": True}, "mamba_proj_bias"),
    ),
    whole_blocks={"ssm_state_size": 64, "mamba_num_heads": 128, "mamba_head_dim": 2},
    cut_blocks=(({"ssm_state_size": 64}, ""), ({"ssm_state_size": 56}, "ssm_in")),
    llama_quantize={"nemotron, experts of 928": _WIDE},
    llama_quantize_by_layer={
        "nemotron, latent experts": {
            **_DEEP,
            "layers_block_type": ["full_attention", *["moe", "linear_attention", "full_attention"] * 5],
            "moe_latent_size": 64,
        },
        "nemotron, networks": {
            **_DEEP,
            "layers_block_type": ["mlp", *["full_attention", "linear_attention", "mlp"] * 5],
        },
    },
)
