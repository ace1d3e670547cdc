"""Nemotron-H's config.json; defaults are those of transformers' ``NemotronHConfig`` (configuration_nemotron_h.py).

NVIDIA's checkpoints have a letter for each layer in ``hybrid_override_pattern``, transformers 5 writes their names in
``layers_block_type``. Where both exist transformers reads the latter; here they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Config, Layer
from bamba_reference.errors import ConfigError

_MAMBA, _ATTENTION, _NETWORK = Layer(("mamba2",)), Layer(("attention",)), Layer(("mlp",))
_EXPERTS = Layer(("moe", "mlp"))
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "-": _NETWORK, "E": _EXPERTS}
# transformers 5 writes the last four; its first releases wrote mamba and attention.
_WORDS = {
    "mamba": _MAMBA,
    "attention": _ATTENTION,
    "linear_attention": _MAMBA,
    "full_attention": _ATTENTION,
    "mlp": _NETWORK,
    "moe": _EXPERTS,
}
_LEAST_TIME_STEP = 1e-30  # transformers takes its logarithm


def _from_letters(value: Any) -> tuple[Layer, ...]:
    schema.require(isinstance(value, str) and set(value) <= _LETTERS.keys())
    return tuple(_LETTERS[letter] for letter in value)


def _from_words(value: Any) -> tuple[Layer, ...]:
    schema.require(
        isinstance(value, list | tuple) and all(isinstance(word, str) and word in _WORDS for word in value)
    )
    return tuple(_WORDS[word] for word in value)


def _letters(config: Config) -> str:
    letters = {layer: letter for letter, layer in _LETTERS.items()}
    return "".join(letters[layer] for layer in config.layers)


def _words(config: Config) -> list[str]:
    names = {layer: word for word, layer in _WORDS.items()}
    return [names[layer] for layer in config.layers]


def _experts(config: Config, value: Any) -> Any:
    """``value`` where the model has experts; transformers' defaults elsewhere say nothing."""
    return value if config.num_local_experts else schema.OMITTED


_KEYS = {
    "vocab_size": schema.count(131072, most=schema.MOST_TOKENS),
    "hidden_size": schema.count(4096),
    "num_hidden_layers": schema.count(
        None, most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers
    ),
    "layers_block_type": schema.HfKey(
        _from_words, f"a list that names each layer: {', '.join(_WORDS)}", write=_words
    ),
    "layer_types": schema.HfKey(_from_words, f"a list that names each layer: {', '.join(_WORDS)}"),
    # vLLM and llama.cpp's converter read this one.
    "hybrid_override_pattern": schema.HfKey(
        _from_letters, f"a letter for each layer: {' '.join(_LETTERS)}", write=_letters
    ),
    "intermediate_size": schema.count(21504),
    "mlp_bias": schema.flag(False),
    "hidden_act": schema.only("relu2", expected="relu2", key="mlp_hidden_act"),
    **hf_keys.attention(32),
    "num_key_value_heads": schema.count(8, null_is_default=False),
    "attention_bias": schema.only(False, expected="false (transformers 5 has no biases there)"),
    "head_dim": schema.count(128, most=schema.MOST_HEAD_DIM, other_key="attention_head_dim"),
    "sliding_window": schema.only(expected="null (full attention)"),
    "mamba_n_heads": schema.count(128, key="mamba_num_heads"),
    "mamba_d_head": schema.count(64, key="mamba_head_dim"),
    "mamba_n_groups": schema.count(8, key="n_groups"),
    "mamba_d_state": schema.count(128, key="ssm_state_size"),
    "mamba_d_conv": schema.count(4, key="conv_kernel"),
    "mamba_conv_bias": schema.flag(True, key="use_conv_bias"),
    "mamba_proj_bias": schema.flag(False, key="use_bias"),
    # Not read by transformers, whose projections have biases where use_bias says so.
    "other_proj_bias": schema.only(False, expected="false", key="mamba_proj_bias"),
    "mixer_act": schema.only("silu", expected="silu", key="mamba_hidden_act"),
    "time_step_limit": hf_keys.TIME_STEP_LIMIT,
    "num_local_experts": schema.count(
        8,
        most=schema.MOST_EXPERTS,
        key="n_routed_experts",
        write=lambda config: _experts(config, config.num_local_experts),
    ),
    "num_experts_per_tok": schema.count(2, write=lambda config: _experts(config, config.num_experts_per_tok)),
    "expert_intermediate_size": schema.count(
        7688,
        key="moe_intermediate_size",
        write=lambda config: _experts(config, config.expert_intermediate_size),
    ),
    "shared_experts": schema.only(1, expected="1", key="n_shared_experts"),
    "shared_size": schema.count(
        7688,
        key="moe_shared_expert_intermediate_size",
        write=lambda config: _experts(config, config.intermediate_size),
    ),
    "moe_latent_size": schema.count(None, write=lambda config: config.moe_latent_size or schema.OMITTED),
    "norm_topk_prob": schema.flag(True, write=lambda config: _experts(config, config.norm_topk_prob)),
    "expert_weights_scale": schema.positive(
        1.0,
        key="routed_scaling_factor",
        write=lambda config: _experts(config, schema.shortest(config.expert_weights_scale)),
    ),
    "expert_groups": schema.count(
        1, key="n_group", write=lambda config: _experts(config, config.expert_groups)
    ),
    "used_expert_groups": schema.count(
        1, key="topk_group", write=lambda config: _experts(config, config.used_expert_groups)
    ),
    "rms_norm_eps": schema.positive(1e-5, key="layer_norm_epsilon", other_key="norm_eps"),
    "other_eps": schema.positive(None, key="rms_norm_eps"),
    "residual_in_fp32": schema.only(False, expected="false"),
    "tie_word_embeddings": schema.only(False, expected="false (transformers 5 does not tie them)"),
    "max_position_embeddings": schema.count(4096),
    # transformers 5.23 takes the lower limit of dt from here, and not from time_step_limit.
    "time_step_min": schema.unchecked(write=lambda config: max(config.time_step_limit[0], _LEAST_TIME_STEP)),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
}
# How dt was drawn before training, how vLLM and Megatron run, layers that predict further tokens, and a rotary
# embedding that no layer has. The mixer's width is heads times head size: ``expand`` is not read.
_INERT = frozenset(
    """
    expand time_step_max time_step_floor time_step_rank rescale_prenorm_residual mamba_ssm_cache_dtype
    moe_shared_expert_overlap num_nextn_predict_layers mtp_layers_block_type mtp_hybrid_override_pattern
    partial_rotary_factor rope_scaling rope_parameters
    """.split()
)


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    schema.quotient(values["num_attention_heads"], values["num_key_value_heads"], "num_attention_heads",
                    "num_key_value_heads")  # fmt: skip
    schema.quotient(values["mamba_n_heads"], values["mamba_n_groups"], "mamba_num_heads", "n_groups")
    if values["other_eps"] not in (None, values["rms_norm_eps"]):
        raise ConfigError(
            "rms_norm_eps and layer_norm_epsilon are two names of one setting and differ",
            found=f"{values['other_eps']} and {values['rms_norm_eps']}",
            expected="the same value, or one of them alone",
        )
    layers = _layers(values)
    return {
        "layers": layers,
        "rope_theta": 10000.0,
        **(_mixture(values, layers) if _EXPERTS in layers else _NO_EXPERTS),
    }


_NO_EXPERTS = {
    "num_local_experts": 0, "num_experts_per_tok": 0, "expert_intermediate_size": 0, "moe_latent_size": 0,
    "norm_topk_prob": True, "expert_weights_scale": 1.0, "expert_groups": 1, "used_expert_groups": 1,
}  # fmt: skip


def _layers(values: Mapping[str, Any]) -> tuple[Layer, ...]:
    said = {
        key: values[key]
        for key in ("layers_block_type", "layer_types", "hybrid_override_pattern")
        if values[key] is not None
    }
    if not said:
        raise ConfigError(
            "the configuration does not say what its layers are",
            expected="hybrid_override_pattern or layers_block_type",
        )
    layers: tuple[Layer, ...]
    (key, layers), *others = said.items()
    for other, found in others:
        if found != layers:
            raise ConfigError(f"{key} and {other} name different layers", expected="the same layers in both")
    if (
        not layers
        or len(layers) > schema.MOST_LAYERS
        or values["num_hidden_layers"] not in (None, len(layers))
    ):
        raise ConfigError(
            f"{key} does not name every layer",
            found=len(layers),
            expected=values["num_hidden_layers"] or f"1 to {schema.MOST_LAYERS}",
        )
    return layers


def _mixture(values: Mapping[str, Any], layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The fields of a model with experts, checked as transformers' ``NemotronHTopkRouter`` needs them."""
    shared, width = values["shared_size"], values["intermediate_size"]
    if _NETWORK in layers and shared != width:
        raise schema.unsupported(
            "moe_shared_expert_intermediate_size",
            shared,
            f"{width}, the intermediate_size of its other networks",
        )
    if values["moe_latent_size"] and values["mlp_bias"]:
        raise schema.unsupported("mlp_bias", True, "false, with moe_latent_size")
    experts, groups = values["num_local_experts"], values["expert_groups"]
    used, chosen = values["used_expert_groups"], values["num_experts_per_tok"]
    size = schema.quotient(experts, groups, "n_routed_experts", "n_group")
    if size < 2:
        raise schema.unsupported("n_group", groups, "groups of at least 2 experts")
    if used > groups:
        raise schema.unsupported("topk_group", used, f"at most n_group, {groups}")
    if chosen > used * size:
        raise schema.unsupported(
            "num_experts_per_tok", chosen, f"at most {used * size} experts in {used} groups"
        )
    return {
        "intermediate_size": shared,
        "expert_scores": "sigmoid",
        "moe_latent_size": values["moe_latent_size"] or 0,
    }


SCHEMA = schema.HfSchema("transformers' NemotronHConfig", _KEYS, _complete, _INERT)
