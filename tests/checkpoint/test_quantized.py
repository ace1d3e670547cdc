"""Quantized directories read back: other people's readers get the same weights, by any rows, and faults are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    PerRow,
    quantize_,
)
from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from bamba_quant.checkpoint import PackedTensor, RawReader, open_checkpoint, read_tensor
from bamba_quant.checkpoint.packed import Activations
from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.errors import PlanError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.model import open_model
from tests.checkpoint.conftest import Made
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, LINEAR, read_all, write_shards

every_scheme = pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)


def configuration(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def theirs(directory: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight as the library that the directory is for decompresses it, float32."""
    tensors, config = read_all(directory), configuration(directory)
    if config["quant_method"] == "compressed-tensors":
        group = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
        reader = BaseCompressor.get_value_from_registry(config["format"])
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, {})[leaf] = tensor
        return {
            f"{module}.weight": reader.decompress(state, group)["weight"].float()
            for module, state in modules.items()
            if "weight_scale" in state
        }
    if config["quant_method"] == "fp8":
        one = Fp8Dequantize(None)._dequantize_one
        return {
            name: one(tensors[name], tensors[f"{name}_scale_inv"], torch.float32)
            for name in tensors
            if f"{name}_scale_inv" in tensors
        }
    return _of_torchao(directory, tensors)


def _of_torchao(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    metadata: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert not metadata or opened.metadata() == metadata
            metadata = opened.metadata()
    found, left = unflatten_tensor_state_dict(tensors, metadata)
    assert not left
    values: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        if isinstance(tensor, Int4Tensor):
            nibbles = torch.stack((tensor.qdata & 15, (tensor.qdata >> 4) & 15), dim=-1).flatten(1)
            unsigned = (nibbles.to(torch.int32) + 8) % 16  # two's complement to 0 … 15
            parts = tensor.scale, tensor.zero_point
        elif isinstance(tensor, Int4TilePackedTo4dTensor):
            unsigned = _in_rows(tensor.qdata)[:, : tensor.shape[1]]
            parts = tensor.scale_and_zero[: tensor.shape[1] // tensor.block_size[1]].unbind(-1)
        else:
            continue
        assert parts[0].dtype == tensor.dtype == torch.bfloat16
        block = tuple(tensor.block_size)
        scale, zero = (part.T.contiguous().float() for part in parts)
        exact = _dequantize_affine_tinygemm(
            unsigned, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
        )
        values[name] = exact.bfloat16().float()
    return values


def _in_rows(words: torch.Tensor) -> torch.Tensor:
    """Codes of 0 … 15 by the indices in ATen's int4mm.cu (``matrix_to_m16n8k16_Bint4_layout``), word by word."""
    tiles, outer = words.shape[:2]
    codes = torch.zeros(8 * tiles, 128 * outer, dtype=torch.int32)
    tile, k, t, j = torch.meshgrid(*(torch.arange(n) for n in words.shape), indexing="ij")
    for place, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        column = 2 * ((k * 8 + 2 * j) * 8 + t % 4 + 4 * (v // 2)) + v % 2
        codes[tile * 8 + t // 4, column] = (words >> (4 * place)) & 15
    return codes


@every_scheme
def test_other_readers_get_the_same_weights(scheme: SafetensorsCodec, made: Made) -> None:
    checkpoint = open_checkpoint(made(scheme))
    expected = theirs(made(scheme))
    packed = {name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, PackedTensor)}
    assert packed == expected.keys() == {name for name in checkpoint.tensors if name.endswith(LINEAR)}
    for name in packed:
        tensor = checkpoint.tensors[name]
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(read_tensor(tensor), expected[name].numpy(), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rows_are_the_whole_tensors(made: Made, data: st.DataObject) -> None:
    checkpoint = open_checkpoint(made(data.draw(st.sampled_from(codecs(SafetensorsCodec)))))
    packed = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, PackedTensor)]
    tensor = data.draw(st.sampled_from(packed))
    start = data.draw(st.integers(0, tensor.rows - 1))
    stop = data.draw(st.integers(start + 1, tensor.rows))
    raw = np.empty((stop - start) * tensor.row_bytes, np.uint8)
    with RawReader() as reader:
        reader.read_rows(tensor, tensor.row_bytes, start, stop, raw)
    rows = tensor.format.dequantize(raw.reshape(stop - start, -1))
    np.testing.assert_array_equal(rows, read_tensor(tensor)[start:stop])


@every_scheme
def test_sizes_are_those_on_disk(scheme: SafetensorsCodec, made: Made) -> None:
    stored = read_all(made(scheme))
    unread = [t for name, t in stored.items() if name.endswith(("weight_shape", "input_global_scale"))]
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    inspection = inspect_path(made(scheme))
    assert inspection.checkpoint.n_bytes == total - sum(tensor.nbytes for tensor in unread)
    assert inspection.architecture == "BambaForCausalLM"
    assert len(inspection.remarks) == bool(scheme.measured)


@every_scheme
def test_it_becomes_a_gguf(scheme: SafetensorsCodec, made: Made, tmp_path: Path) -> None:
    directory = made(scheme)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    back, weights = load_model(file).weights, load_model(directory).weights
    for name in weights:
        found = np.asarray(back[name], np.float32)
        if not name.endswith("A_log"):
            np.testing.assert_array_equal(found, np.asarray(weights[name], np.float32), err_msg=name)


def test_requantizing_must_be_asked_for(made: Made, tmp_path: Path) -> None:
    directory = made(codecs(SafetensorsCodec)[0])
    with pytest.raises(PlanError, match=r"quantized already(.|\n)*--allow-requantize"):
        to_gguf(directory, tmp_path / "model.gguf", "q8_0", vocab=False)
    file = to_gguf(directory, tmp_path / "model.gguf", "q8_0", vocab=False, allow_requantize=True)
    weights, back = load_model(directory).weights, load_model(file).weights
    name = "model.layers.0.mamba.in_proj.weight"
    expected = np.asarray(weights[name], np.float32)
    assert np.abs(np.asarray(back[name]) - expected).max() <= np.abs(expected).max() / 100


def test_torchao_float8_by_row(tmp_path: Path) -> None:
    """What torchao itself makes and flattens on a CPU."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = random_bamba(seed=4, **DIVIDES).bfloat16()
    base = save_checkpoint(model, tmp_path / "base", "bfloat16")
    by_row = Float8WeightOnlyConfig(granularity=PerRow())
    quantize_(model, by_row, lambda module, name: name.endswith("_proj"))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    expected = {
        name: tensor.dequantize() if hasattr(tensor, "dequantize") else tensor
        for name, tensor in state.items()
    }
    flat, metadata = flatten_tensor_state_dict(state)
    directory = tmp_path / "float8"
    directory.mkdir()
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (directory / "config.json").write_text(json.dumps(config))
    write_shards(directory, flat, metadata | {"format": "pt"})
    checkpoint = open_checkpoint(directory)
    for name, values in expected.items():
        found = np.asarray(read_tensor(checkpoint.tensors[name]), np.float32)
        np.testing.assert_array_equal(found, values.float().numpy(), err_msg=name)


def test_nvfp4_with_quantized_activations(made: Made, tmp_path: Path) -> None:
    """As llm-compressor's NVFP4 has it: the same weights, and numbers for activations that are named as unused."""
    source = made(next(scheme for scheme in codecs(SafetensorsCodec) if scheme.name == "nvfp4a16"))
    config = json.loads((source / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = preset_name_to_scheme("NVFP4", ["Linear"]).model_dump(mode="json")[
        "input_activations"
    ]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = read_all(source)
    inputs = {
        name.replace("weight_g", "input_g"): tensor * 2
        for name, tensor in tensors.items()
        if "global" in name
    }
    write_shards(tmp_path, tensors | inputs, {"format": "pt"})
    found, expected = open_checkpoint(tmp_path), open_checkpoint(source)
    assert found.unused == tuple(sorted(inputs))
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(read_tensor(tensor), read_tensor(expected.tensors[name]))
        if isinstance(tensor, PackedTensor):
            scale = float(inputs[name.removesuffix("weight") + "input_global_scale"])
            assert tensor.activations == Activations("nvfp4", 16, scale=scale)


def test_published_forms_of_scales(made: Made, tmp_path: Path) -> None:
    """A scale without axes and one of shape (1, 1); scales of activations are named as unused."""
    scheme = next(scheme for scheme in codecs(SafetensorsCodec) if scheme.name == "fp8-tensor")
    source = made(scheme)
    expected = {name: read_tensor(tensor) for name, tensor in open_checkpoint(source).tensors.items()}
    for shape in ((), (1, 1)):
        directory = tmp_path / f"{len(shape)}"
        directory.mkdir()
        (directory / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = {
            name: tensor.reshape(shape) if name.endswith("weight_scale") else tensor
            for name, tensor in read_all(source).items()
        }
        tensors |= {
            name.replace("weight_scale", "input_scale"): tensor.clone()
            for name, tensor in tensors.items()
            if name.endswith("weight_scale")
        }
        write_shards(directory, tensors, {"format": "pt"})
        checkpoint = open_checkpoint(directory)
        assert checkpoint.unused == tuple(sorted(name for name in tensors if name.endswith("input_scale")))
        for name, values in expected.items():
            np.testing.assert_array_equal(read_tensor(checkpoint.tensors[name]), values)
        assert open_model(directory).pairs
        unread = f"{len(checkpoint.unused)} tensors are for quantized activations alone"
        assert unread in inspect_path(directory).remarks[0]
        notes = plan_conversion(directory, vocab=False).notes
        assert unread in notes[-1]
