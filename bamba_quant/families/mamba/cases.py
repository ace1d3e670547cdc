"""Small Mamba and FalconMamba models for the tests."""

from typing import Any

from bamba_quant.families.small_models import MIXERS_ALONE, WIDE_MIXER, Keys, SmallModels

_CASES: dict[str, Keys] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "rank 7, state 8": {"time_step_rank": 7, "state_size": 8},
    "vocabulary of 161": {"vocab_size": 161},
    "large epsilon": {"layer_norm_epsilon": 3e-2},
}
_REFERENCE_CASES: dict[str, Keys] = {
    "": {},
    ", untied, rank 7": {"tie_word_embeddings": False, "time_step_rank": 7, "layer_norm_epsilon": 1e-3},
    ", biases, state 5": {"use_bias": True, "use_conv_bias": False, "state_size": 5, "expand": 3},
    ", stream in the model's dtype": {"residual_in_fp32": False, "conv_kernel": 2},
}


def _state_spaces(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {"d_state": config.state_size, "dt_rank": config.time_step_rank},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }


MAMBA_MODELS = SmallModels(
    transformers_class="MambaForCausalLM",
    keys=MIXERS_ALONE,
    cases=_CASES,
    reference_cases={f"mamba{name}": keys for name, keys in _REFERENCE_CASES.items()},
    multiples_of_128={"hidden_size": 128},
    state_spaces=_state_spaces,
    state_spaces_cases=("plain", "rank 7, state 8"),
    refused_by_gguf=(({"expand": 3}, "mamba_expand"), ({"use_bias": True}, "mamba_proj_bias")),
    llama_quantize={"mamba, a rank of 48": {**WIDE_MIXER, "time_step_rank": 48}},
)
FALCON_MAMBA_MODELS = SmallModels(
    transformers_class="FalconMambaForCausalLM",
    keys=MIXERS_ALONE,
    cases=_CASES,
    reference_cases={
        f"falcon{name}": {"mixer_rms_eps": 1e-2, **keys} for name, keys in _REFERENCE_CASES.items()
    },
    multiples_of_128={"hidden_size": 128},
    refused_by_gguf=(({"use_conv_bias": False}, "mamba_conv_bias"),),
    llama_quantize={
        "falcon_mamba": {**WIDE_MIXER, "tie_word_embeddings": False, "time_step_rank": 256},
    },
)
