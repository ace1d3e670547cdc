"""Every family's configuration is read whole, in every spelling, or refused by key and value."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bamba_quant.errors import ArchitectureError, ConfigError
from bamba_quant.families import families, family_of, read_config
from bamba_quant.families.hf_schema import FAMILY_KEYS
from tests.support.families import CASES, FAMILIES, SPELLED, random_case, save
from tests.support.published import PUBLISHED

NAMES = [family.name for family in families()]
FAMILY = {family.name: family for family in families()}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["", "auto", "silu", "mamba", "Infinity", "x", 0, 1, 8, 10**400, -1, math.inf, math.nan]
    )
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["__float__", "rope_theta", "rope_type", "type", "partial_rotary_factor", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def written(name: str, **overrides: Any) -> dict[str, Any]:
    """The configuration of a small model as transformers 5 writes it."""
    family = FAMILIES[name]
    text = family.config(**overrides).to_json_string(use_diff=False)
    return {**json.loads(text), "architectures": [family.model.__name__]}


@functools.cache
def small_config(name: str) -> Mapping[str, Any]:
    """``written`` without overrides, once a family."""
    return MappingProxyType(written(name))


def test_every_family_is_tested() -> None:
    assert set(NAMES) == FAMILIES.keys()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=230, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_is_read_or_refused(name: str, data: st.DataObject) -> None:
    good = small_config(name)
    keys = st.sampled_from(sorted(FAMILY[name].hf_schema.names | FAMILY_KEYS))
    values = data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3))
    try:
        config = read_config(good | values)
    except (ConfigError, ArchitectureError) as error:
        assert str(error)
        return
    assert config.num_hidden_layers > 0
    assert not config.mamba_expand or config.mamba_d_inner == config.mamba_expand * config.hidden_size
    if config.mamba_layers:
        assert config.mamba_n_heads * config.mamba_d_head == config.mamba_d_inner
    assert (good | values).get("num_hidden_layers") in (None, config.num_hidden_layers)
    assert math.isfinite(config.rms_norm_eps) and config.rms_norm_eps > 0
    assert math.isfinite(config.rope_theta) and config.rope_theta > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_key_that_transformers_writes_is_known(name: str) -> None:
    known = FAMILY[name].hf_schema.known
    assert not {key for key in small_config(name) if key not in known and not key.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 0.0, False, "", [], {}, 1])
def test_an_unknown_key_is_refused_whatever_it_says(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="new_thing"):
        read_config(small_config(name) | {"new_thing": value})
    assert read_config(small_config(name) | {"new_thing": None}) == read_config(small_config(name))
    assert read_config(small_config(name) | {"new_thing": value}, ignore=["new_thing"])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_configuration_is_what_transformers_says(name: str, case: str) -> None:
    """The sizes that transformers' model has, under whatever name its configuration gives them."""
    model = random_case(name, case)
    config = read_config(written(name, **FAMILIES[name].small.cases[case]))
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert config.vocab_size == model.get_input_embeddings().num_embeddings
    for layer, (blocks, _) in zip(model.base_model.layers, config.layers, strict=True):
        mixer = getattr(layer, "mixer", None) or getattr(layer, "mamba", None)
        if "attention" in blocks:
            attention = getattr(layer, "self_attn", None) or mixer
            assert (config.attention_scale, config.head_dim) == (attention.scaling, attention.head_dim)
        if not {"mamba2", "mamba1"} & set(blocks):
            assert not hasattr(mixer, "conv1d")
            continue
        assert (config.mamba_d_inner, config.mamba_d_state) == (mixer.intermediate_size, mixer.ssm_state_size)
        assert config.mamba_in_proj_dim == mixer.in_proj.out_features
        assert config.mamba_conv_dim == mixer.conv1d.out_channels
        if "mamba2" in blocks:
            assert (config.mamba_n_heads, config.mamba_d_head) == (mixer.num_heads, mixer.head_dim)
            assert config.time_step_limit == pytest.approx(tuple(mixer.time_step_limit))
        else:
            assert config.mamba_time_step_rank == mixer.time_step_rank
            weighted = name == "jamba"
            epsilon = mixer.dt_layernorm.variance_epsilon if weighted else getattr(mixer, "rms_eps", None)
            assert (config.mixer_rms_eps, config.mixer_norm_weights) == (epsilon, weighted)


@pytest.mark.parametrize(("name", "case", "spelling"), SPELLED)
def test_every_spelling_is_the_same_configuration(
    name: str, case: str, spelling: Any, tmp_path: Path
) -> None:
    model = random_case(name, case)
    read = json.loads((save(model, tmp_path, spelling=spelling) / "config.json").read_text())
    expected = read_config(written(name, **FAMILIES[name].small.cases[case]))
    if spelling == "state-spaces":  # whose configurations know no tokens
        expected = dataclasses.replace(expected, bos_token_id=None, eos_token_ids=(), pad_token_id=None)
    assert family_of(read).name == name
    assert read_config(read) == expected


FALCON_7B = PUBLISHED["tiiuae/falcon-mamba-7b"].config
CODESTRAL = PUBLISHED["mistralai/Mamba-Codestral-7B-v0.1"].config
MAMBA_130M = PUBLISHED["state-spaces/mamba-2.8b"].config | {"d_model": 768, "n_layer": 24}
MAMBA2_130M = PUBLISHED["state-spaces/mamba2-130m"].config
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MAMBA_130M_HF = PUBLISHED["state-spaces/mamba-130m-hf"].config | NO_TOKENS


def test_falcon_mamba_says_another_expansion_than_its_weights_have() -> None:
    config = read_config(FALCON_7B)
    assert (config.mamba_d_inner, config.mamba_expand, config.mamba_time_step_rank) == (8192, 2, 256)
    assert config.mixer_rms_eps == 1e-6 and not config.tie_word_embeddings


def test_codestral_says_norm_before_gate_and_has_eight_groups() -> None:
    config = read_config(CODESTRAL)
    assert (config.mamba_n_groups, config.mamba_conv_dim, config.mamba_in_proj_dim) == (8, 10240, 18560)
    assert config.intermediate_size == 0 and config.residual_in_fp32


def test_state_spaces_own_models() -> None:
    first, second = read_config(MAMBA_130M), read_config(MAMBA2_130M)
    assert (first.vocab_size, first.mamba_time_step_rank, first.mamba_d_state) == (50280, 48, 16)
    assert (second.vocab_size, second.mamba_n_heads, second.mamba_n_groups, second.mamba_d_state) == (
        50288,
        24,
        1,
        128,
    )
    assert first.tie_word_embeddings and second.tie_word_embeddings
    assert first.layers_of("mamba1") == second.mamba_layers == tuple(range(24))
    assert read_config(MAMBA_130M_HF) == first
    assert read_config(MAMBA_130M | {"architectures": ["MambaLMHeadModel"], "model_type": "mamba"}) == first
    # transformers' vocabulary is what it says, padded or not.
    assert read_config(MAMBA_130M_HF | {"vocab_size": 80961}).vocab_size == 80961


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        (MAMBA_130M, {"rms_norm": False}, "rms_norm"),
        (MAMBA_130M, {"ssm_cfg": {"layer": "Mamba3"}}, "not supported"),
        (MAMBA_130M, {"ssm_cfg": {"new": 1}}, "ssm_cfg.new"),
        (MAMBA_130M, {"ssm_cfg": [1]}, "ssm_cfg"),
        (MAMBA2_130M, {"attn_layer_idx": [9, 18]}, "attn_layer_idx"),
        (MAMBA2_130M, {"d_intermediate": 1024}, "d_intermediate"),
        (MAMBA2_130M, {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm"),
        (MAMBA2_130M, {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate"),
        (MAMBA2_130M, {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim"),
        (MAMBA2_130M, {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 768}}, "d_ssm"),
        (MAMBA2_130M, {"ssm_cfg": {"layer": "Mamba2", "headdim": 100}}, "head_dim"),
        (MAMBA_130M_HF, {"d_model": 700}, "d_model"),
        (MAMBA_130M_HF, {"d_inner": 160}, "d_inner"),
        (MAMBA_130M_HF, {"intermediate_size": 1000}, "intermediate_size"),
        (MAMBA_130M_HF, {"hidden_act": "gelu"}, "hidden_act"),
        (MAMBA_130M_HF, {"time_step_rank": "all"}, "time_step_rank"),
        (FALCON_7B, {"mixer_rms_eps": 0}, "mixer_rms_eps"),
        (CODESTRAL, {"num_heads": 100}, "num_heads"),
        (CODESTRAL, {"n_groups": 3}, "n_groups"),
        (CODESTRAL, {"intermediate_size": 4096}, "intermediate_size"),
        (CODESTRAL, {"rms_norm": False}, "rms_norm"),
        (CODESTRAL, {"mixer_rms_eps": 1e-6}, "mixer_rms_eps"),
    ],
)
def test_what_is_not_implemented_is_named(good: dict[str, Any], bad: dict[str, Any], named: str) -> None:
    read_config(good)
    with pytest.raises((ConfigError, ArchitectureError), match=named):
        read_config(good | bad)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
        ({"position_embedding_type": 1}, "position_embedding_type"),
        ({"normalization_function": "layernorm"}, "normalization_function"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["mamba"] * 3}, "layer_types"),
        ({"layer_types": ["moe"] * 4}, "layer_types"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_local_experts": 1, "num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_local_experts": -1}, "num_local_experts"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size"),
        ({"logits_scaling": 0}, "logits_scaling"),
        ({"embedding_multiplier": -1}, "embedding_multiplier"),
        ({"mamba_n_groups": 3}, "mamba_n_groups"),
    ],
)
def test_what_granite_could_say_and_is_not_implemented(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(written("granitemoehybrid") | bad)


def test_granite() -> None:
    config = read_config(written("granitemoehybrid"))
    assert config.rotary_dim == 0 and config.num_local_experts == config.expert_intermediate_size == 0
    assert config.attention_layers == (1,)
    rotated = read_config(written("granitemoehybrid", position_embedding_type="rope"))
    assert rotated == dataclasses.replace(config, rotary_dim=16)
    sparse = written("granitemoehybrid", num_local_experts=4, num_experts_per_tok=2, intermediate_size=40)
    config = read_config(sparse)
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.expert_intermediate_size, config.intermediate_size) == (40, 96)


@pytest.mark.parametrize(
    "hf",
    [
        {},
        {"architectures": ["LlamaForCausalLM"], "model_type": "bamba"},
        {"model_type": "llama"},
        {"model_type": ["bamba"]},
        {"architectures": "BambaForCausalLM"},
        {"architectures": [1], "model_type": "mamba"},
        {"d_model": 64, "n_layer": 2, "ssm_cfg": {"layer": ["Mamba1"]}},
    ],
)
def test_an_unknown_family_is_refused_with_the_known(hf: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="architecture") as error:
        read_config(hf)
    for name in FAMILIES:
        assert FAMILIES[name].model.__name__ in str(error.value)
