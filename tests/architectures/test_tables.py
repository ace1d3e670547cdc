"""Every architecture's table: its names are gguf-py's, its shapes are transformers', nothing is covered twice."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from bamba_quant.architectures import Architecture, architecture_of, architectures
from bamba_quant.errors import ArchitectureError
from bamba_reference import Config
from tests.support.models import hf_config, numpy_weights, random_bamba

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "groups": {"mamba_n_groups": 4},
    "two attention layers": {"attn_layer_indices": [0, 2]},
}


@pytest.mark.parametrize("architecture", architectures(), ids=lambda architecture: architecture.name)
def test_gguf_names_are_those_of_gguf_py(architecture: Architecture) -> None:
    model_type = next(
        kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf_architecture
    )
    names = gguf.get_tensor_name_map(model_type, 4)
    known = set(gguf.MODEL_TENSORS[model_type])
    config = Config.from_hf(hf_config(random_bamba(attention_bias=True, mlp_bias=True)))
    for rule in architecture.tensors(config):
        if rule.gguf is None:
            continue
        # gguf-py's map knows dt_bias under the name its converter gives it first.
        found = names.get_type_and_name(rule.hf.replace("dt_bias", "dt_proj.bias"), (".weight", ".bias"))
        assert found is not None, rule.hf
        assert found[1] == rule.gguf
        assert found[0] in known


@pytest.mark.parametrize("case", CASES)
def test_table_covers_a_transformers_model(case: str) -> None:
    model = random_bamba(**CASES[case])
    hf = hf_config(model)
    weights = numpy_weights(model)
    rules = {rule.hf: rule for rule in architecture_of(hf).tensors(Config.from_hf(hf))}
    assert {name for name, rule in rules.items() if not rule.left_out} == weights.keys()
    for name, array in weights.items():
        assert rules[name].shape == array.shape, name
        assert np.prod(rules[name].gguf_shape) == array.size, name
    written = [rule.gguf for rule in rules.values() if rule.gguf]
    assert len(written) == len(set(written))


def test_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM[\s\S]*BambaForCausalLM"):
        architecture_of({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ArchitectureError, match="no architectures"):
        architecture_of({})
    assert architecture_of({"model_type": "bamba"}).name == "bamba"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mamba_expand", 4), ("mamba_proj_bias", True), ("mamba_conv_bias", False), ("time_step_limit", [0.01, 0.5]),
        ("time_step_limit", [0.01, float("inf")]), ("attn_layer_indices", []), ("attn_layer_indices", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_represent(key: str, value: Any) -> None:
    hf = hf_config(random_bamba()) | {key: value}
    if key == "mamba_expand":
        hf["mamba_n_heads"] *= 2
    config = Config.from_hf(hf)
    with pytest.raises(ArchitectureError, match="cannot represent") as error:
        architecture_of(hf).check_gguf(config)
    named = "layer_types" if value == [0, 1, 2, 3] else key
    assert f"this model's {named}" in str(error.value)


def test_every_key_value_follows_the_configuration() -> None:
    overrides = {
        "rms_norm_eps": 1e-3, "max_position_embeddings": 777, "mamba_n_groups": 2, "mamba_d_state": 24,
        "mamba_d_conv": 3, "num_hidden_layers": 3, "attn_layer_indices": [2], "intermediate_size": 88,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    hf = hf_config(random_bamba(**overrides))
    found = {key: value.value for key, value in architecture_of(hf).gguf_metadata(Config.from_hf(hf)).items()}
    assert found == {
        "block_count": 3, "context_length": 777, "embedding_length": 64, "feed_forward_length": 88, "vocab_size": 160,
        "attention.head_count": 4, "attention.head_count_kv": [0, 0, 2], "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-3, "rope.dimension_count": 4,
        "rope.freq_base": 5000.0, "rope.scaling.finetuned": True, "ssm.conv_kernel": 3, "ssm.inner_size": 128,
        "ssm.state_size": 24, "ssm.time_step_rank": 8, "ssm.group_count": 2,
    }  # fmt: skip


def test_attention_by_period() -> None:
    hf = hf_config(random_bamba()) | {
        "attn_layer_indices": None,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    }
    assert Config.from_hf(hf).attention_layers == (1, 3)
