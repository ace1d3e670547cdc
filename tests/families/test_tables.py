"""Every architecture's table: its names are gguf-py's and the reference's, its shapes those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from bamba_quant.errors import ArchitectureError
from bamba_quant.families import Family, families, family_of, read_config
from bamba_reference import Config
from bamba_reference.tensors import tensor_shapes
from tests.support.families import CASES, FAMILIES, random_case, save
from tests.support.models import hf_config, random_bamba


def configured(name: str, case: str = "plain", **overrides: Any) -> tuple[Family, Config]:
    hf = (
        random_case(name, case).config.to_dict()
        | {"architectures": [FAMILIES[name].model.__name__]}
        | overrides
    )
    return family_of(hf), read_config(hf)


def test_every_family_has_models_for_the_tests() -> None:
    assert {"bamba", "granitemoehybrid", "mamba", "falcon_mamba", "mamba2"} <= FAMILIES.keys()
    for family in families():
        assert family.small_models.transformers_class in family.hf_architectures
        assert family.small_models.cases.keys() >= {"plain"} and family.small_models.reference_cases
    names = [case for family in families() for case in family.small_models.reference_cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_gguf_names_are_those_of_gguf_py(name: str, case: str) -> None:
    architecture, config = configured(name, case)
    model_type = next(
        kind
        for kind, known in gguf.MODEL_ARCH_NAMES.items()
        if known == architecture.gguf_architecture(config)
    )
    names = gguf.get_tensor_name_map(model_type, 4)
    known = {
        gguf.TENSOR_NAMES[kind].format(bid=i) for kind in gguf.MODEL_TENSORS[model_type] for i in range(4)
    }
    for rule in architecture.tensors(config):
        if rule.gguf is None:
            continue
        assert rule.gguf.removesuffix(".weight").removesuffix(".bias") in known
        # llama.cpp's converter takes these apart by hand: its map has no names for the parts, or the wrong ones.
        if "input_linear" in rule.hf or "shared_mlp" in rule.hf or ".mixer.experts" in rule.hf:
            continue
        # gguf-py's map knows some biases and stacked experts under the names its converters give them first.
        first = rule.hf.replace("dt_bias", "dt_proj.bias").replace("correction_bias", "correction.bias")
        first = first.replace("feed_forward.experts.*", "mlp.experts")
        found = names.get_type_and_name(first, (".weight", ".bias"))
        assert found is not None, rule.hf
        assert found[1] == rule.gguf


@pytest.mark.parametrize(("name", "case"), CASES)
def test_table_has_the_references_tensors(name: str, case: str) -> None:
    architecture, config = configured(name, case)
    rules = [rule for rule in architecture.tensors(config) if not rule.skipped]
    assert {rule.name: rule.shape for rule in rules} == tensor_shapes(config)
    written = [rule.gguf for rule in rules if rule.gguf]
    assert len(written) == len(set(written))
    assert all(np.prod(rule.gguf_shape) == np.prod(rule.shape) for rule in rules)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_table_covers_what_transformers_writes(name: str, case: str, tmp_path: Path) -> None:
    architecture, config = configured(name, case)
    directory = save(random_case(name, case), tmp_path)
    with safe_open(directory / "model.safetensors", "np") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    rules = [rule for rule in architecture.tensors(config) if not rule.skipped]
    assert {name: shape for rule in rules for name, shape in rule.stored(rule.hf).items()} == stored


def test_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(ArchitectureError, match=r"LlamaForCausalLM[\s\S]*BambaForCausalLM"):
        family_of({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ArchitectureError, match="no architectures"):
        family_of({})
    assert family_of({"model_type": "bamba"}).name == "bamba"


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
    config = read_config(hf)
    with pytest.raises(ArchitectureError, match="cannot represent") as error:
        family_of(hf).check_gguf(config)
    named = "layer_types" if value == [0, 1, 2, 3] else key
    assert f"this model's {named}" in str(error.value)


def test_every_key_value_follows_the_configuration() -> None:
    overrides = {
        "rms_norm_eps": 1e-3, "max_position_embeddings": 777, "mamba_n_groups": 2, "mamba_d_state": 24,
        "mamba_d_conv": 3, "num_hidden_layers": 3, "attn_layer_indices": [2], "intermediate_size": 88,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    hf = hf_config(random_bamba(**overrides))
    found = {key: value.value for key, value in family_of(hf).gguf_metadata(read_config(hf)).items()}
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
    assert read_config(hf).attention_layers == (1, 3)
