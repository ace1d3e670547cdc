"""Models that people have: their configurations alone give the plan, and as many weights as their makers count."""

from __future__ import annotations

import json
from decimal import Decimal
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bamba_quant.errors import ArchitectureError, CheckpointError, PlanError, TokenizerError
from bamba_quant.families import family_of, read_config
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.tensors import tensor_shapes
from tests.support.published import PUBLISHED, Published

SMALL = PUBLISHED["state-spaces/mamba-130m-hf"]


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_weights_are_as_many_as_published(model: Published) -> None:
    config = read_config(model.config)
    count = sum(prod(shape) for shape in tensor_shapes(config).values())
    published = Decimal(model.parameters)
    last_digit = Decimal(1).scaleb(int(published.as_tuple().exponent))
    assert abs(count - published) <= last_digit / 2
    assert family_of(model.config).name == model.family


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=name) for name, m in PUBLISHED.items() if "model_type" in m.config]
)
def test_weights_are_as_many_as_transformers_makes(model: Published) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config))
    count = sum(prod(shape) for shape in tensor_shapes(read_config(model.config)).values())
    corrections = (buffer for name, buffer in made.named_buffers() if name.endswith("correction_bias"))
    assert count == sum(tensor.numel() for tensor in (*made.parameters(), *corrections))


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
def test_a_configuration_alone_is_planned(model: Published, tmp_path: Path) -> None:
    directory = model.save(tmp_path)
    shapes = tensor_shapes(read_config(model.config))
    count = sum(map(prod, shapes.values()))
    found = inspect_path(directory / "config.json")
    assert found.checkpoint.elements == count
    assert "no weights were read" in found.remarks[0]
    gguf = plan_conversion(directory, outtype="q4_k_m", allow_config_only=True)
    assert gguf.elements == count and len(gguf.rows) == len(shapes)
    assert {"no vocabulary was planned", found.remarks[0]} <= set(gguf.notes)
    quantized = plan_quantization(directory, "fp8-dynamic", allow_config_only=True)
    assert quantized.elements == count
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_is_imagined_is_not_written(tmp_path: Path) -> None:
    directory = SMALL.save(tmp_path / "m")
    planned = plan_conversion(directory, outfile=tmp_path / "m.gguf", allow_config_only=True)
    with pytest.raises(PlanError, match="no weights to write"):
        write_plan(planned, planned.outfile)
    with pytest.raises(CheckpointError, match="no weights"):
        plan_conversion(directory)
    assert not (tmp_path / "m.gguf").exists()


def test_a_broken_tokenizer_beside_a_configuration_is_an_error(tmp_path: Path) -> None:
    directory = SMALL.save(tmp_path)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):
        plan_conversion(directory, allow_config_only=True)
    assert plan_conversion(directory, allow_config_only=True, vocab=False).rows


def test_only_a_whole_model_of_a_known_family_is_imagined(tmp_path: Path) -> None:
    def configured(change: dict[str, object]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(SMALL.config | change))
        return tmp_path

    quantized = configured({"quantization_config": {"quant_method": "fp8"}})
    for refused in (inspect_path, lambda path: plan_conversion(path, allow_config_only=True)):
        with pytest.raises(PlanError, match="quantization_config"):
            refused(quantized)
    other = configured({"architectures": ["LlamaForCausalLM"]})
    for refused in (inspect_path, lambda path: plan_conversion(path, allow_config_only=True)):
        with pytest.raises(ArchitectureError, match="BambaForCausalLM"):
            refused(other)
