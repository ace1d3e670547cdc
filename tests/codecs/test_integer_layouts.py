"""Layouts of integers: parts as planned, versions of the same bytes, packings that lose no code, the writer's bytes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import Int4Tensor, Int4TilePackedTo4dTensor, Int4WeightOnlyConfig
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import TorchAoConfig

from bamba_quant.codecs import Ignored, SafetensorsCodec, codec_named
from bamba_quant.codecs.base import DTYPES
from bamba_quant.codecs.integers.grid import pack
from bamba_quant.codecs.integers.pack_quantized import CODECS as PACKED
from bamba_quant.codecs.integers.pack_quantized import pack_zeros, unpack_zeros
from bamba_quant.codecs.integers.torchao_plain import CODECS as PLAIN
from bamba_quant.codecs.integers.torchao_tiles import CODECS as TILES
from bamba_quant.codecs.integers.torchao_tiles import pack_tiles, unpack_tiles
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import FormatError, PlanError
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from tests.support.quantized import quantized_parts, read_all, read_back, save_quantized, to_torch

BAMBA_9B = {
    "architectures": ["BambaForCausalLM"], "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "mamba_n_heads": 128, "mamba_d_head": 64,
    "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    "mamba_proj_bias": False, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
INTEGERS = (*PACKED, *PLAIN, *TILES)
every_layout = pytest.mark.parametrize("scheme", INTEGERS, ids=lambda scheme: scheme.name)


@every_layout
def test_parts_are_as_planned_and_hold_the_weights(scheme: SafetensorsCodec) -> None:
    rows, columns = 24, 256
    x = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    loss = {}
    for method in scheme.methods:
        parts = {**method.encode(x, None, None), **scheme.whole(rows, columns, None)}
        planned = scheme.parts(rows, columns)
        assert parts.keys() == {part.suffix for part in planned}
        for part in planned:
            assert parts[part.suffix].shape == part.shape
            assert parts[part.suffix].dtype == DTYPES[part.dtype]
        assert scheme.n_bytes(rows, columns) == sum(array.nbytes for array in parts.values())
        loss[method.name] = float(((read_back(scheme, parts, x.shape) - x) ** 2).sum() / (x**2).sum())
    assert loss["mse"] < loss["rtn"] < (3e-4 if "w8" in scheme.name else 2e-2)
    assert loss["hqq"] < min(1.01 * loss["mse"], loss["rtn"])


@pytest.mark.parametrize(
    "name", ("w4a16-asym-g64", "w8a16-g32", "torchao-int4-g64", "torchao-int4-tile-packed-g64")
)
def test_versions_and_chunks_give_the_same_parts(name: str) -> None:
    scheme = codec_named(name, SafetensorsCodec)
    rows, columns = 20 if scheme.row_multiple == 1 else 40, 192
    x = np.random.default_rng(2).normal(size=(rows, columns)).astype(np.float32)
    importance = np.random.default_rng(3).random(columns).astype(np.float32)
    method = scheme.method("hqq")
    assert method.compiled is not None
    compiled = method.compiled()
    whole = method.encode(x, importance, None)
    step = 8
    chunks = [compiled(x[i : i + step], importance, None) for i in range(0, rows, step)]
    for part in scheme.parts(rows, columns):
        if part.rows:
            joined = np.concatenate([chunk[part.suffix] for chunk in chunks], axis=part.axis)
            np.testing.assert_array_equal(joined.view(np.uint8), whole[part.suffix].view(np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from((4, 8)))
def test_words_are_compressed_tensors_own(data: st.DataObject, bits: int) -> None:
    low = -(1 << bits - 1)
    rows, groups = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5))
    zeros = data.draw(arrays(np.int8, (rows, groups), elements=st.integers(low, -low - 1)))
    theirs = pack_to_int32(torch.from_numpy(zeros), bits, packed_dim=0)
    np.testing.assert_array_equal(pack_zeros(zeros, bits), theirs.numpy())
    np.testing.assert_array_equal(unpack_zeros(theirs.numpy(), bits, rows), zeros)
    codes = data.draw(arrays(np.int8, (rows, 32 * groups), elements=st.integers(low, -low - 1)))
    words = pack(codes, bits, -low).view("<i4")
    np.testing.assert_array_equal(words, pack_to_int32(torch.from_numpy(codes), bits).numpy())
    back = unpack_from_int32(torch.from_numpy(words), bits, torch.Size(codes.shape))
    np.testing.assert_array_equal(back.numpy(), codes)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_tiles_lose_no_code(data: st.DataObject) -> None:
    shape = (8 * data.draw(st.integers(1, 3)), 128 * data.draw(st.integers(1, 3)))
    codes = data.draw(arrays(np.int8, shape, elements=st.integers(-8, 7)))
    words = pack_tiles(codes)
    assert words.shape == (shape[0] // 8, shape[1] // 128, 32, 4)
    np.testing.assert_array_equal(unpack_tiles(words), codes)


def test_tiles_hold_what_the_plain_layout_holds() -> None:
    x = np.random.default_rng(6).normal(size=(16, 1024)).astype(np.float32)
    for plain, tiles in zip(PLAIN, TILES, strict=True):
        values = [
            read_back(each, quantized_parts(each, each.method("hqq"), x), x.shape) for each in (plain, tiles)
        ]
        np.testing.assert_array_equal(*values)


def test_tiles_are_where_the_kernel_looks_for_them() -> None:
    """A lane t of a warp holds rows t / 4 and, of 32 columns, the pairs that begin at 2·(t mod 4), 8 apart."""
    codes = np.full((8, 128), -8, np.int8)
    codes[3, 2 * 32 + 2 * (4 * 1 + 2) + 1] = 7  # row 3, word 2, pair 1, lane 2, second of the pair
    words = pack_tiles(codes).view(np.uint32)
    assert np.argwhere(words).tolist() == [[0, 0, 4 * 3 + 2, 2]]
    assert words[0, 0, 14, 2] == 15 << 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao packs tiles on CUDA alone")
def test_tiles_are_those_of_cuda() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (64, 2048)).astype(np.int8)
    unsigned = torch.from_numpy(codes).cuda().to(torch.int32) + 8
    pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    np.testing.assert_array_equal(pack_tiles(codes), theirs.cpu().numpy())


@pytest.mark.parametrize(
    ("scheme", "method"), list(product(("w4a16-asym-g128", "torchao-int4-g64"), ("rtn", "hqq")))
)
def test_the_writer_streams_what_a_whole_matrix_becomes(scheme: str, method: str, tmp_path: Path) -> None:
    known = codec_named(scheme, SafetensorsCodec)
    expected = save_quantized(embedded_model(), tmp_path / "plain", known, method)
    plan = plan_quantization(embedded_model(), scheme, method=method, max_shard_bytes=1_000_000)
    write_plan(plan, tmp_path / "streamed", threads=2)
    ours, theirs = read_all(tmp_path / "streamed"), read_all(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith(("A_log", ".D", "dt_bias")):
            tensor = tensor.to(ours[name].dtype)
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(
            ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def test_a_range_beyond_bfloat16_is_refused() -> None:
    x = np.full((8, 128), 3.4e38, np.float32)
    x[:, ::2] *= -1
    for scheme in (
        codec_named("w4a16-asym-g128", SafetensorsCodec),
        codec_named("torchao-int4-g128", SafetensorsCodec),
    ):
        with pytest.raises(FormatError, match="too large for a bfloat16 scale"):
            scheme.method("rtn").encode(x, None, None)


def test_a_row_that_groups_do_not_fill_is_named() -> None:
    with pytest.raises(FormatError, match=r"500 columns|500(.|\n)*multiples of 128"):
        codec_named("w4a16-g128", SafetensorsCodec).check(10, 500)
    with pytest.raises(FormatError, match="rows in multiples of 8"):
        codec_named("torchao-int4-tile-packed-g128", SafetensorsCodec).check(10, 512)


def test_a_quantized_input_is_refused(tmp_path: Path) -> None:
    directory = save_quantized(embedded_model(), tmp_path / "model", PLAIN[0], "rtn")
    with pytest.raises(PlanError, match=r"quantized already(.|\n)*torchao"):
        plan_quantization(directory, "w4a16-g128")


def test_scales_stay_bfloat16_to_the_disk() -> None:
    x = np.random.default_rng(4).normal(size=(8, 128)).astype(np.float32)
    parts = codec_named("w4a16-g128", SafetensorsCodec).method("rtn").encode(x, None, None)
    assert parts[".weight_scale"].dtype == np.dtype(ml_dtypes.bfloat16)
    assert np.array_equal(
        parts[".weight_scale"].astype(np.float32),
        (np.abs(x).max(axis=1, keepdims=True) / np.float32(7.5))
        .astype(ml_dtypes.bfloat16)
        .astype(np.float32),
    )


@pytest.mark.parametrize("scheme", PACKED, ids=lambda scheme: scheme.name)
def test_compressed_tensors_understands_the_configuration(scheme: SafetensorsCodec) -> None:
    config = scheme.configuration(Ignored(("lm_head",)))
    understood = QuantizationConfig.model_validate(config)
    assert understood.quantization_status == "compressed"
    assert understood.ignore == ["lm_head"]
    (group,) = understood.config_groups.values()
    assert group.format == understood.format == "pack-quantized"
    assert group.targets == ["Linear"]
    # vLLM takes pack-quantized weights only without quantized activations and in the order of columns.
    assert group.input_activations is None
    assert group.weights.actorder is None
    preset = {"w4a16-g128": "W4A16", "w8a16-g128": "W8A16", "w4a16-asym-g128": "W4A16_ASYM"}.get(scheme.name)
    if preset:
        expected = preset_name_to_scheme(preset, ["Linear"]).weights
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
            assert getattr(group.weights, field) == getattr(expected, field), field


@pytest.mark.parametrize("scheme", (*PLAIN, *TILES), ids=lambda scheme: scheme.name)
def test_torchao_understands_the_configuration(scheme: SafetensorsCodec) -> None:
    understood = TorchAoConfig.from_dict(scheme.configuration(Ignored(("lm_head",))))
    made = understood.get_apply_tensor_subclass()
    assert isinstance(made, Int4WeightOnlyConfig)
    assert scheme.name.endswith(f"-g{made.group_size}")
    tiles = made.int4_packing_format == Int4PackingFormat.TILE_PACKED_TO_4D
    assert tiles == ("tile-packed" in scheme.name)
    assert understood.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize("scheme", (PLAIN[0], TILES[0]), ids=lambda scheme: scheme.name)
def test_torchao_makes_its_tensors_of_the_parts(scheme: SafetensorsCodec) -> None:
    x = np.random.default_rng(5).normal(size=(16, 1024)).astype(np.float32)
    parts = scheme.method("rtn").encode(x, None, None)
    tensors = {f"model.proj{suffix}": to_torch(part) for suffix, part in parts.items()}
    metadata = scheme.metadata({"model.proj.weight": (16, 1024)}, [])
    found, left = unflatten_tensor_state_dict(tensors, metadata)
    assert not left
    tensor = found["model.proj.weight"]
    assert type(tensor) is (Int4TilePackedTo4dTensor if "tile" in scheme.name else Int4Tensor)
    assert tensor.shape == (16, 1024)
    assert list(tensor.block_size) == [1, 128]
    assert tensor.dtype == torch.bfloat16
    again, described = flatten_tensor_state_dict(found)
    assert {key: json.loads(text) for key, text in described.items()} == {
        key: json.loads(text) for key, text in metadata.items() if key != "format"
    }
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_sizes_of_bamba_9b(tmp_path: Path) -> None:
    """8,727,822,336 weights in matrices, 2.1048 GB of others in bf16, a scale for 128 columns."""
    (tmp_path / "config.json").write_text(json.dumps(BAMBA_9B))
    sizes = {
        name: sum(plan_quantization(tmp_path, name, allow_config_only=True).bytes_by_dtype.values()) / 1e9
        for name in ("w4a16-g128", "w8a16-g128", "torchao-int4-g128")
    }
    assert sizes == pytest.approx(
        {"w4a16-g128": 6.605, "w8a16-g128": 10.969, "torchao-int4-g128": 6.741}, abs=1e-3
    )
