"""transformers and compressed-tensors load every FP8 directory and compute what its dequantized weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bamba_quant.inference.loading import load_model
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.torch import forward as torch_forward
from tests.planning.test_quantize import WIDE
from tests.support import directories
from tests.support.conversion import random_tokens, transformers_logits
from tests.support.models import random_bamba, save_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

COMPRESSED = ["fp8-dynamic", "fp8-tensor", "fp8-block"]
TOKENS = random_tokens(160, 60)


def made(directory: Path, scheme: str, keep: list[str], **options: Any) -> tuple[Any, Path, Plan]:
    model = random_bamba(**WIDE)
    source = save_checkpoint(model, directory / "model")
    plan = plan_quantization(source, scheme, keep=keep, **options)
    write_plan(plan, directory / "quantized")
    return model, directory / "quantized", plan


def rounded_oracle(plan: Plan, directory: Path, dtype: torch.dtype) -> Any:
    """transformers' own model on the weights of the plan, each rounded to ``dtype`` as loaders round them."""
    stored = directories.tensors(directory)
    state = {name: tensor for name, tensor in stored.items() if tensor.dtype != torch.float8_e4m3fn}
    state |= {
        name: torch.from_numpy(v).to(dtype) for name, v in directories.dequantized(plan, stored).items()
    }
    oracle = random_bamba(**WIDE)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.copy_(state[name])
    return oracle


def reference_logits(directory: Path) -> np.ndarray:
    loaded = load_model(directory)
    model = torch_forward.load(loaded.config, loaded.weights)
    with torch.no_grad():
        return torch_forward.forward(model, torch.tensor([TOKENS])).logits[0].numpy()


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("keep", [[], ["hybrid"]], ids=["all", "hybrid"])
@pytest.mark.parametrize("scheme", COMPRESSED)
def test_weights_alone(scheme: str, keep: list[str], tmp_path: Path) -> None:
    """Dequantized while loading: exactly the products of codes and scales, rounded to the scales' bfloat16."""
    _, directory, plan = made(tmp_path, scheme, keep)
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    state = loaded.state_dict()
    for name, values in directories.dequantized(plan, directories.tensors(directory)).items():
        assert torch.equal(state[name], torch.from_numpy(values).to(torch.bfloat16).float()), name
    found = transformers_logits(loaded, TOKENS)
    assert_near(found, transformers_logits(rounded_oracle(plan, directory, torch.bfloat16), TOKENS), 1e-5)
    # The reference multiplies in float32 by weights that nothing rounds again.
    assert_near(found, reference_logits(directory), 0.03)


@pytest.mark.parametrize("keep", [[], ["hybrid"]], ids=["all", "hybrid"])
@pytest.mark.parametrize("scheme", COMPRESSED)
def test_weights_and_activations(scheme: str, keep: list[str], tmp_path: Path) -> None:
    """As transformers loads by default: activations pass through FP8 before each quantized layer, and only there."""
    _, directory, plan = made(tmp_path, scheme, keep)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.update({name: (args[0], out)})
            )
    found = transformers_logits(loaded, TOKENS)
    weights = dict(rounded_oracle(plan, directory, torch.bfloat16).named_parameters())
    quantized = {matrix.source.name.removesuffix(".weight") for matrix in plan.matrices}
    assert quantized < seen.keys()
    for name, (x, out) in seen.items():
        x = through_fp8(x, scheme) if name in quantized else x
        expected = torch.nn.functional.linear(x, weights[f"{name}.weight"])
        # In this mode the product of code and scale is not rounded; FP8 itself moves an output by 0.03.
        assert_near(out.detach().numpy(), expected.detach().numpy(), 3e-3 if name in quantized else 1e-6)
    difference = np.linalg.norm(found - reference_logits(directory)) / np.linalg.norm(found)
    assert 0.01 < difference < 0.5


def through_fp8(x: torch.Tensor, scheme: str) -> torch.Tensor:
    groups = {"fp8-dynamic": x.unsqueeze(-2), "fp8-tensor": x.reshape(1, -1)}.get(scheme)
    if groups is None:
        groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    codes = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * scale).reshape(x.shape)


@pytest.mark.parametrize(("dtype", "others"), [(torch.bfloat16, "bf16"), (torch.float32, "stored")])
def test_transformers_own_form(dtype: torch.dtype, others: str, tmp_path: Path) -> None:
    """Without a GPU its codes are dequantized while loading; what is not quantized keeps its stored type."""
    _, directory, plan = made(tmp_path, "fp8-block-inv", ["hybrid"], dtype=others)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    state = loaded.state_dict()
    for name, values in directories.dequantized(plan, directories.tensors(directory)).items():
        assert torch.equal(state[name], torch.from_numpy(values).to(dtype)), name
    found = transformers_logits(loaded, TOKENS)
    assert_near(found, reference_logits(directory), 1e-4 if dtype == torch.float32 else 0.08)


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors_decompresses_the_same_values(scheme: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    _, directory, plan = made(tmp_path, scheme, [])
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    stored = directories.tensors(directory)
    for name, values in directories.dequantized(plan, stored).items():
        scale = stored[name.removesuffix(".weight") + ".weight_scale"]
        found = compressor.decompress({"weight": stored[name], "weight_scale": scale}, group)["weight"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.from_numpy(values).to(torch.bfloat16)), name
        assert torch.equal(found.float(), torch.from_numpy(values)), name


def test_fields_that_loaders_need(tmp_path: Path) -> None:
    _, directory, _ = made(tmp_path, "fp8-dynamic", [])
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    # Without the first transformers computes with unscaled codes.
    assert config["quantization_status"] == "compressed"
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head"]
