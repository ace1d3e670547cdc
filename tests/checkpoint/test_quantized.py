"""Quantized directories read back: other people's readers get the same weights, by any rows, and faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int4Tensor, PerRow, quantize_
from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from bamba_quant.checkpoint import PackedTensor, RawReader, open_checkpoint, read_tensor
from bamba_quant.convert import plan_conversion
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, PlanError
from bamba_quant.inspection import inspect_path
from bamba_quant.schemes import Scheme, schemes
from bamba_quant.source import open_source
from bamba_quant.weights import load_model
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import LINEAR, read_all, save_quantized, write_shards

# Rows and columns of every matrix divide by 128.
DIVIDES = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 56,
}  # fmt: skip
READABLE = [scheme for scheme in schemes() if "tile-packed" not in scheme.name]
every_scheme = pytest.mark.parametrize("scheme", READABLE, ids=lambda scheme: scheme.name)

Made = Callable[[Scheme], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A quantized random model of each scheme, in two shards, made once."""
    place = tmp_path_factory.mktemp("quantized")
    base = save_checkpoint(random_bamba(seed=9, **DIVIDES), place / "base", "bfloat16")
    found: dict[str, Path] = {}

    def make(scheme: Scheme) -> Path:
        if scheme.name not in found:
            method = scheme.methods[-1].name
            found[scheme.name] = save_quantized(base, place / scheme.name, scheme, method, shards=2)
        return found[scheme.name]

    return make


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
        if not isinstance(tensor, Int4Tensor):
            continue
        assert tensor.scale.dtype == tensor.dtype == torch.bfloat16
        nibbles = torch.stack((tensor.qdata & 15, (tensor.qdata >> 4) & 15), dim=-1).flatten(1)
        unsigned = (nibbles.to(torch.int32) + 8) % 16  # two's complement to 0 … 15
        block = tuple(tensor.block_size)
        scale, zero = (part.T.contiguous().float() for part in (tensor.scale, tensor.zero_point))
        exact = _dequantize_affine_tinygemm(
            unsigned, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
        )
        values[name] = exact.bfloat16().float()
    return values


@every_scheme
def test_other_readers_get_the_same_weights(scheme: Scheme, made: Made) -> None:
    checkpoint = open_checkpoint(made(scheme))
    expected = theirs(made(scheme))
    packed = {name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, PackedTensor)}
    assert packed == expected.keys() == {name for name in checkpoint.tensors if name.endswith(LINEAR)}
    for name in packed:
        tensor = checkpoint.tensors[name]
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(read_tensor(tensor), expected[name].numpy(), err_msg=name)


@every_scheme
def test_it_holds_what_the_scheme_decodes(scheme: Scheme, made: Made) -> None:
    checkpoint = open_checkpoint(made(scheme))
    stored = read_all(made(scheme))
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, PackedTensor):
            module = name.removesuffix(".weight")
            parts = {}
            for part in scheme.parts(*tensor.shape):
                found = stored[module + part.suffix]
                raw = found.contiguous().view(torch.uint8).numpy() if found.ndim else found.numpy()
                parts[part.suffix] = raw.view(_dtype(part.dtype)).reshape(part.shape)
            decoded = torch.from_numpy(scheme.decode(parts, tensor.columns))
            values = torch.from_numpy(read_tensor(tensor))
            if scheme.name.startswith("fp8") and scheme.name != "fp8-block-inv":
                decoded = decoded.bfloat16().float()  # compressed-tensors rounds the product
            torch.testing.assert_close(values, decoded, rtol=0, atol=0)


def _dtype(name: str) -> np.dtype[Any]:
    from bamba_quant.schemes.base import DTYPES

    return DTYPES[name]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rows_are_the_whole_tensors(made: Made, data: st.DataObject) -> None:
    checkpoint = open_checkpoint(made(data.draw(st.sampled_from(READABLE))))
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
def test_sizes_are_those_on_disk(scheme: Scheme, made: Made) -> None:
    stored = read_all(made(scheme))
    unread = [tensor for name, tensor in stored.items() if name.endswith("weight_shape")]
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    inspection = inspect_path(made(scheme))
    assert inspection.checkpoint.n_bytes == total - sum(tensor.nbytes for tensor in unread)
    assert inspection.architecture == "BambaForCausalLM"
    assert not inspection.remarks


@every_scheme
def test_it_becomes_a_gguf(scheme: Scheme, made: Made, tmp_path: Path) -> None:
    directory = made(scheme)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    back, weights = load_model(file).weights, load_model(directory).weights
    for name in weights:
        found = np.asarray(back[name], np.float32)
        if not name.endswith("A_log"):
            np.testing.assert_array_equal(found, np.asarray(weights[name], np.float32), err_msg=name)


def test_requantizing_must_be_asked_for(made: Made, tmp_path: Path) -> None:
    directory = made(READABLE[0])
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


def test_published_forms_of_scales(made: Made, tmp_path: Path) -> None:
    """A scale without axes and one of shape (1, 1); scales of activations are named as unused."""
    scheme = next(scheme for scheme in READABLE if scheme.name == "fp8-tensor")
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
        assert open_source(directory).pairs
        unread = f"{len(checkpoint.unused)} tensors for quantized activations are not read"
        assert unread in inspect_path(directory).remarks[0]
        notes = plan_conversion(directory, vocab=False).plan.notes
        assert unread in notes[-1]


MODULE = "model.layers.0.mamba.in_proj"
Tensors = dict[str, torch.Tensor]


def _drop(suffix: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def drop(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[MODULE + suffix]

    return drop


def _put(
    suffix: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors, dict[str, Any]], None]:
    def put(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[MODULE + suffix] = change(tensors.get(MODULE + suffix, torch.zeros(1)))

    return put


def _weights(**values: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


def _config(**values: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config.update(values)


FAULTS: list[tuple[str, str, Callable[[Tensors, dict[str, Any]], None], str]] = [
    ("no scale", "fp8-dynamic", _drop(".weight_scale"), r"lacks a part(.|\n)*in_proj\.weight_scale"),
    ("no codes", "w4a16-g128", _drop(".weight_packed"), r"such a part cannot be read(.|\n)*in_proj\.weight_"),
    ("no shape", "w4a16-g128", _drop(".weight_shape"), r"lacks a part(.|\n)*in_proj\.weight_shape"),
    ("no zeros", "w4a16-asym-g128", _drop(".weight_zero_point"), r"lacks a part(.|\n)*in_proj\.weight_zero_point"),
    ("scales cut", "w4a16-g64", _put(".weight_scale", lambda t: t[:, :1].contiguous()), r"not what(.|\n)*\(\d+, 2\)"),
    ("scales of integers", "fp8-dynamic", _put(".weight_scale", lambda t: t.to(torch.int32)), "i32 of shape"),
    ("codes cut", "w4a16-g128", _put(".weight_packed", lambda t: t[:-1].contiguous()), "not what"),
    ("another shape", "w4a16-g128", _put(".weight_shape", lambda t: t * 2), "not what"),
    ("no shape at all", "w4a16-g128", _put(".weight_shape", lambda t: t * 0), "0 × 0"),
    ("order of groups", "w4a16-g128", _put(".weight_g_idx", lambda t: torch.zeros(128, dtype=torch.int32)), "g_idx"),
    ("three bits", "w4a16-g128", _weights(num_bits=3), "3 bits"),
    ("unknown strategy", "fp8-dynamic", _weights(strategy="lattice"), "'lattice'"),
    ("no group size", "w4a16-g128", _weights(group_size=None), "group_size None"),
    ("unsymmetric floats", "fp8-dynamic", _weights(symmetric=False), "symmetric"),
    ("integers said to be floats", "w4a16-g128", _weights(type="float"), "no group of quantization_config"),
    ("no groups", "fp8-dynamic", _config(config_groups={}), "no group of quantization_config"),
    ("unknown method", "fp8-dynamic", _config(quant_method="gptq"), r"'gptq'(.|\n)*compressed-tensors, fp8, torchao"),
    ("no blocks", "fp8-block-inv", _config(weight_block_size=None), "weight_block_size None"),
    ("other blocks", "fp8-block-inv", _config(weight_block_size=[64, 64]), "not what"),
    ("no inverse", "fp8-block-inv", _drop(".weight_scale_inv"), r"lacks a part(.|\n)*in_proj\.weight_scale_inv"),
    ("no torchao scale", "torchao-int4-g128", _drop("._weight_scale"), r"lacks a part(.|\n)*in_proj\._weight_scale"),
    ("stray codes", "fp8-tensor", _put(".extra", lambda t: torch.zeros(4, dtype=torch.int8)), "belongs to no weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "spoil", "message"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_faults_are_named(scheme: str, spoil: Callable[[Tensors, dict[str, Any]], None], message: str, made: Made,
                          tmp_path: Path) -> None:  # fmt: skip
    from safetensors import safe_open

    source = made(next(known for known in READABLE if known.name == scheme))
    with safe_open(next(source.glob("*.safetensors")), framework="pt") as opened:
        metadata = opened.metadata()
    tensors = read_all(source)
    config = json.loads((source / "config.json").read_text())
    spoil(tensors, config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_shards(tmp_path, tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_codes_without_a_configuration_are_refused(made: Made, tmp_path: Path) -> None:
    write_shards(tmp_path, read_all(made(READABLE[0])), {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"F8_E4M3(.|\n)*no quantization_config"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ("fp8-dynamic", "w4a16-g128"))
def test_a_scale_that_is_no_number_ends_a_conversion(name: str, made: Made, tmp_path: Path) -> None:
    source = made(next(known for known in READABLE if known.name == name))
    tensors = read_all(source)
    tensors[f"{MODULE}.weight_scale"][3, 0] = torch.nan
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    write_shards(directory, tensors, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"not a finite number(.|\n)*in_proj(.|\n)*nan at row 3, column 0"
    ):
        to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    assert not (tmp_path / "model.gguf").exists()


def test_torchao_types_that_are_not_known_are_named(made: Made, tmp_path: Path) -> None:
    scheme = next(scheme for scheme in schemes() if "tile-packed" in scheme.name)
    directory = save_quantized(embedded_model(), tmp_path / "model", scheme, "rtn")
    with pytest.raises(CheckpointError, match=r"'Int4TilePackedTo4dTensor'(.|\n)*Int4Tensor"):
        open_checkpoint(directory)
