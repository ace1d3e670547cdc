"""Directories as AutoFP8, NVIDIA's ModelOpt and IBM write them: read, run with their activations, converted to GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bamba_quant.checkpoint import StackedTensor, open_checkpoint, packed_like
from bamba_quant.errors import BambaQuantError, CheckpointError, PlanError
from bamba_quant.evaluation.activations import with_activations
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from tests.reference.cases import relative_error
from tests.support.conversion import to_gguf
from tests.support.families import STACKED, save, wide_case
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, LINEAR, read_all

TOKENS = list(range(3, 40))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Parts = tuple[dict[str, torch.Tensor], torch.Tensor]  # by suffix, and the values that they stand for


def fp8(weight: torch.Tensor, *, dims: tuple[int, ...] | None = None, shape: tuple[int, ...] = ()) -> Parts:
    """e4m3 under a number for all of ``dims``, by default for the matrix."""
    dims = dims or tuple(range(weight.dim()))
    scale = weight.abs().amax(dims, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = scale if len(dims) < weight.dim() else scale.reshape(shape)
    return {".weight": codes, ".weight_scale": stored}, codes.float() * scale


def nvfp4(weight: torch.Tensor) -> Parts:
    """ModelOpt's: two codes a byte, e4m3 for 16 of them, and a number by which these are multiplied."""
    whole = weight.abs().max() / (6 * 448)
    blocks = weight.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    step = (scale.float() * whole)[..., None]
    codes = ((blocks / step)[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    values = (E2M1[codes.long()] * step).flatten(-2).bfloat16().float()
    codes = codes.flatten(-2)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return {".weight": packed, ".weight_scale": scale, ".weight_scale_2": whole}, values


def modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
    }


INPUT = torch.tensor(0.0125)
AUTO = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FORMS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "AutoFP8, static": (AUTO, fp8, "e4m3 by tensor, static"),
    "AutoFP8, dynamic": (
        AUTO | {"activation_scheme": "dynamic"},
        lambda weight: fp8(weight, shape=(1,)),
        "e4m3 by tensor",
    ),
    "ModelOpt, FP8": (modelopt("FP8"), fp8, "e4m3 by tensor, static"),
    "ModelOpt, NVFP4": (modelopt("NVFP4"), nvfp4, "nvfp4"),
    "ModelOpt, both": (modelopt("MIXED_PRECISION"), None, "e4m3 by tensor, static, nvfp4"),
}


def written(form: str, place: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory in this form, and the values that its matrices stand for."""
    config, encode, _ = FORMS[form]
    source = save_checkpoint(random_bamba(seed=5, **DIVIDES), place / "model")
    tensors, expected = {}, {}
    for name, tensor in read_all(source).items():
        if not name.endswith(LINEAR):
            tensors[name] = tensor
            continue
        parts, expected[name] = (encode or (nvfp4 if "feed_forward" in name else fp8))(tensor.float())
        if "dynamic" not in form:
            parts[".input_scale"] = INPUT.clone()
        tensors |= {
            name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()
        }
    if config["quant_method"] == "modelopt":
        tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    return stored(source, place / "quantized", config, tensors), expected


def stored(
    source: Path, directory: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Path:
    directory.mkdir()
    written = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(written))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(path: Path, activations: str = "none") -> tuple[np.ndarray, str]:
    loaded = load_model(path)
    backend = with_activations(TORCH, loaded, activations, torch.device("cpu"), torch.float32)
    ready = torch_forward.load(loaded.config, loaded.weights, backend=backend)
    with torch.no_grad():
        return torch_forward.forward(ready, torch.tensor([TOKENS])).logits[0].numpy(), backend.name


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_two_dimensions(form: str, tmp_path: Path) -> None:
    directory, expected = written(form, tmp_path)
    weights = load_model(directory).weights
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values.numpy(), err_msg=name)
    found, _ = logits(directory)
    assert relative_error(logits(to_gguf(directory, tmp_path / "m.gguf", vocab=False))[0], found) < 1e-5
    rounded, name = logits(directory, "checkpoint")
    assert name == f"torch, activations {FORMS[form][2]} (emulated)"
    assert 0.002 < relative_error(rounded, found) < 1
    rule = next(
        each.activations for each in map(packed_like, open_checkpoint(directory).tensors.values()) if each
    )
    assert rule is not None
    if rule.scale:
        assert rule.scale == pytest.approx(float(1 / INPUT if rule.strategy == "nvfp4" else INPUT))
    with pytest.raises(PlanError, match="quantized already"):
        plan_quantization(directory, "fp8-dynamic")


def test_a_configuration_in_a_file_of_its_own(tmp_path: Path) -> None:
    directory, expected = written("ModelOpt, NVFP4", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no quantization_config"):
        load_model(directory)
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    name = next(iter(expected))
    np.testing.assert_array_equal(load_model(directory).weights[name], expected[name].numpy())
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(CheckpointError, match="W4A8_AWQ"):
        load_model(directory)
    cache = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(cache))
    with pytest.raises(BambaQuantError, match="attention cache"):
        logits(directory, "checkpoint")
    config["quantization_config"] = AUTO | {"activation_scheme": "slow"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="activation_scheme 'slow'"):
        load_model(directory)
    assert quantization["quant_method"] == "modelopt"


@pytest.mark.parametrize("dims", [(2,), (1, 2)], ids=["by row", "by expert"])
def test_stacks_of_experts(dims: tuple[int, ...], tmp_path: Path) -> None:
    """As llm-compressor writes Granite's: e4m3 (E, rows, columns), scales (E, rows, 1); inputs by token."""
    source = save(wide_case(*STACKED[0]), tmp_path / "model", dtype="bfloat16")
    tensors, expected = {}, {}
    for name, tensor in read_all(source).items():
        linear = name.endswith(("_linear.weight", *LINEAR)) and not name.endswith("router.layer.weight")
        if not linear:
            tensors[name] = tensor
            continue
        parts, expected[name] = fp8(tensor.float(), dims=dims if tensor.dim() == 3 else (1,))
        tensors |= {
            name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()
        }
    stacks = [name for name, values in expected.items() if values.dim() == 3]
    each = {"num_bits": 8, "type": "float", "symmetric": True}
    activations = each | {"strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": each | {"strategy": "channel"},
        "input_activations": activations,
    }
    of_experts = group | {"targets": ["re:.*block_sparse_moe.*_linear$"]}
    of_experts["weights"] = each | {"strategy": "channel" if len(dims) == 1 else "tensor"}
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": of_experts, "group_1": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    directory = stored(source, tmp_path / "quantized", quantization, tensors)
    found = open_checkpoint(directory).tensors
    assert stacks and all(isinstance(found[name], StackedTensor) for name in stacks)
    plain, _ = logits(directory)
    originals = {
        name: tensor for name, tensor in tensors.items() if name not in found or name not in expected
    }
    values = {
        name: tensor for name, tensor in originals.items() if not name.endswith("weight_scale")
    } | expected
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text((source / "config.json").read_text())
    save_file(
        {name: tensor.contiguous() for name, tensor in values.items()},
        tmp_path / "plain" / "model.safetensors",
    )
    assert relative_error(plain, logits(tmp_path / "plain")[0]) < 1e-6
    assert relative_error(logits(to_gguf(directory, tmp_path / "m.gguf", vocab=False))[0], plain) < 1e-5
    rounded, name = logits(directory, "checkpoint")
    assert name.endswith("e4m3 by token (emulated)") and 0.002 < relative_error(rounded, plain) < 0.5
