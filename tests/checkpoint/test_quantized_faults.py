"""Quantized directories in every way in which they can be broken: each fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.errors import CheckpointError
from tests.checkpoint.conftest import Made
from tests.support.conversion import to_gguf
from tests.support.quantized import read_all, write_shards

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


def _targets(value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config["config_groups"]["group_0"].update(targets=value)


FAULTS: list[tuple[str, str, Callable[[Tensors, dict[str, Any]], None], str]] = [
    ("no scale", "fp8-dynamic", _drop(".weight_scale"), r"is missing(.|\n)*in_proj\.weight_scale"),
    ("no codes", "w4a16-g128", _drop(".weight_packed"), r"such a part cannot be read(.|\n)*in_proj\.weight_"),
    ("no shape", "w4a16-g128", _drop(".weight_shape"), r"is missing(.|\n)*in_proj\.weight_shape"),
    ("no zeros", "w4a16-asym-g128", _drop(".weight_zero_point"), r"is missing(.|\n)*in_proj\.weight_zero_point"),
    ("scales cut", "w4a16-g64", _put(".weight_scale", lambda t: t[:, :1].contiguous()), r"not match(.|\n)*\(\d+, 2\)"),
    ("scales of integers", "fp8-dynamic", _put(".weight_scale", lambda t: t.to(torch.int32)), "i32 of shape"),
    ("codes cut", "w4a16-g128", _put(".weight_packed", lambda t: t[:-1].contiguous()), "does not match"),
    ("another shape", "w4a16-g128", _put(".weight_shape", lambda t: t * 2), "does not match"),
    ("no shape at all", "w4a16-g128", _put(".weight_shape", lambda t: t * 0), "0 × 0"),
    ("order of groups", "w4a16-g128", _put(".weight_g_idx", lambda t: torch.zeros(128, dtype=torch.int32)), "g_idx"),
    ("three bits", "w4a16-g128", _weights(num_bits=3), "num_bits 3"),
    ("bits as a float", "w4a16-g128", _weights(num_bits=4.0), r"num_bits 4\.0"),
    ("bits as a truth", "w8a16-g128", _weights(num_bits=True), "num_bits True"),
    ("bits of a float", "fp8-dynamic", _weights(num_bits=8.0), r"num_bits 8\.0"),
    ("symmetry as text", "w4a16-g128", _weights(symmetric="false"), "symmetric 'false'"),
    ("symmetry as a number", "fp8-dynamic", _weights(symmetric=1), "symmetric 1"),
    ("a group size as a float", "w4a16-g128", _weights(group_size=128.0), r"group_size 128\.0"),
    ("a large group size", "w4a16-g128", _weights(group_size=10**400), "group_size 1000"),
    ("a block as a float", "fp8-block", _weights(block_structure=[128.0, 128]), r"block_structure \[128\.0, 128\]"),
    ("a block of nothing", "fp8-block", _weights(block_structure=[0, 128]), r"block_structure \[0, 128\]"),
    ("a block in a block", "fp8-block", _weights(block_structure=[[128], 128]), r"block_structure \[\[128\], 128\]"),
    ("a strategy as a list", "fp8-dynamic", _weights(strategy=["channel"]), r"strategy \['channel'\]"),
    ("weights as a list", "fp8-dynamic", lambda t, config: config["config_groups"]["group_0"].update(weights=[8]),
     "no group of quantization_config"),
    ("blocks as floats", "fp8-block-inv", _config(weight_block_size=[128.0, 128]), r"block_size \[128\.0, 128\]"),
    ("blocks as truths", "fp8-block-inv", _config(weight_block_size=[True, True]), "weight_block_size"),
    ("large blocks", "fp8-block-inv", _config(weight_block_size=[2**63, 128]), "weight_block_size"),
    ("a hanging target", "fp8-dynamic", _targets(["re:(?:.|.)*(?:.|.)*(?:.|.)*$x"]), "no group|within 2 s"),
    ("unknown strategy", "fp8-dynamic", _weights(strategy="lattice"), "'lattice'"),
    ("no group size", "w4a16-g128", _weights(group_size=None), "group_size None"),
    ("unsymmetric floats", "fp8-dynamic", _weights(symmetric=False), "symmetric"),
    ("integers said to be floats", "w4a16-g128", _weights(type="float"), "no group of quantization_config"),
    ("no groups", "fp8-dynamic", _config(config_groups={}), "no group of quantization_config"),
    ("rotated weights", "fp8-dynamic", _config(transform_config={"config_groups": {"u": {}}}), "transform_config"),
    ("a list of groups", "fp8-dynamic", _config(config_groups=[1]), "no group of quantization_config"),
    ("targets that are none", "fp8-dynamic", _targets(5), "no group of quantization_config"),
    ("a target that is not an expression", "fp8-dynamic", _targets(["re:("]), r"re:\((.|\n)*regular expression"),
    ("a method that is not a name", "fp8-dynamic", _config(quant_method=[]), r"quant_method \[\]"),
    ("unknown method", "fp8-dynamic", _config(quant_method="gptq"), r"'gptq'(.|\n)*compressed-tensors, fp8, modelopt"),
    ("no blocks", "fp8-block-inv", _config(weight_block_size=None), r"does not match quantization_config(.|\n)*\(1,\)"),
    ("other blocks", "fp8-block-inv", _config(weight_block_size=[64, 64]), "does not match"),
    ("no inverse", "fp8-block-inv", _drop(".weight_scale_inv"), r"is missing(.|\n)*in_proj\.weight_scale_inv"),
    ("no torchao scale", "torchao-int4-g128", _drop("._weight_scale"), r"is missing(.|\n)*in_proj\._weight_scale"),
    ("no global scale", "nvfp4a16", _drop(".weight_global_scale"), r"is missing(.|\n)*weight_global_scale"),
    ("a global scale of 0", "nvfp4a16", _put(".weight_global_scale", torch.zeros_like), r"global_scale(.|\n)*0\.0"),
    ("a global scale that is not a number", "nvfp4a16", _put(".weight_global_scale", lambda t: t * torch.nan), "nan"),
    ("several global scales", "nvfp4a16", _put(".weight_global_scale", lambda t: t.repeat(2)), r"of shape \(2,\)"),
    ("MXFP4's scales as NVFP4's", "mxfp4a16", _weights(strategy="tensor_group", group_size=16), "u8 of shape"),
    ("FP4 in groups of 64", "mxfp4a16", _weights(group_size=64), "group_size 64"),
    ("FP4 with zeros", "nvfp4a16", _weights(symmetric=False), "symmetric False"),
    ("FP4's bits as a float", "nvfp4a16", _weights(num_bits=4.0), r"num_bits 4\.0"),
    ("FP4 codes cut", "nvfp4a16", _put(".weight_packed", lambda t: t[:, :-4].contiguous()), "whole groups of 16"),
    ("no FP4 codes", "nvfp4a16", _put(".weight_packed", lambda t: t[:0]), "whole groups of 16|shape"),
    ("stray codes", "fp8-tensor", _put(".extra", lambda t: torch.zeros(4, dtype=torch.int8)), "belong to any weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "spoil", "message"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_faults_are_named(scheme: str, spoil: Callable[[Tensors, dict[str, Any]], None], message: str, made: Made,
                          tmp_path: Path) -> None:  # fmt: skip
    source = made(next(known for known in codecs(SafetensorsCodec) if known.name == scheme))
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
    write_shards(tmp_path, read_all(made(codecs(SafetensorsCodec)[0])), {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"F8_E4M3(.|\n)*no quantization_config"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ("fp8-dynamic", "w4a16-g128"))
def test_a_scale_that_is_no_number_ends_a_conversion(name: str, made: Made, tmp_path: Path) -> None:
    source = made(next(known for known in codecs(SafetensorsCodec) if known.name == name))
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
    source = made(next(known for known in codecs(SafetensorsCodec) if known.name == "torchao-int4-g128"))
    with safe_open(next(source.glob("*.safetensors")), framework="pt") as opened:
        metadata = opened.metadata()
    described = metadata[f"{MODULE}.weight"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    for spoiled, message in (
        (described.replace("Int4Tensor", "NVFP4Tensor"), "'NVFP4Tensor'(.|\\n)*Int4Tensor"),
        (described.replace("scale", "act_pre_scale"), "act_pre_scale"),
        (described.replace("[1, 128]", "[2, 128]"), "blocks of 2 × 128"),
        (described.replace('"Int4Tensor"', "[]"), r"\[\](.|\n)*Int4Tensor"),
        (described.replace('"qdata"', "[1]"), r"Int4Tensor of \['qdata'"),
        ("no JSON", "JSON"),
        ("[" * 100_000, "nested too deeply"),
    ):
        write_shards(tmp_path, read_all(source), metadata | {f"{MODULE}.weight": spoiled})
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)
    write_shards(tmp_path, read_all(source), {"format": "pt"})
    with pytest.raises(CheckpointError, match="nothing from torchao"):
        open_checkpoint(tmp_path)
