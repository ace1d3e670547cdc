"""Activations rounded as FP8 checkpoints have them are compressed-tensors', and a model so run is transformers' own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.checkpoint import PackedTensor, open_checkpoint, read_tensor
from bamba_quant.checkpoint.compressed_tensors import activations_of_group
from bamba_quant.checkpoint.dequantize import Float8Dequantizer
from bamba_quant.checkpoint.packed import Activations
from bamba_quant.codecs import Ignored, SafetensorsCodec, codec_named, codecs
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.activations import resolve, with_activations
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.fp8_activations import (
    has_scaled_products,
    quantized,
    rounded,
    scaled_product,
    weight_codes,
    with_fp8_activations,
)
from bamba_quant.inference.loading import LoadedModel, load_model
from bamba_quant.inference.weights import LazyWeights
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from bamba_reference.torch.forward import to_tensor
from tests.evaluation.conftest import OPTIONS
from tests.reference.cases import relative_error
from tests.support.conversion import to_gguf, transformers_logits
from tests.support.kernels import DEVICE
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import DIVIDES, save_quantized

CPU = torch.device("cpu")
FLOAT8 = [scheme for scheme in codecs(SafetensorsCodec) if scheme.name.startswith("fp8")]
COMPRESSED = [scheme.name for scheme in FLOAT8 if not scheme.name.endswith("inv")]
TOKENS = list(range(3, 60))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        random_bamba(seed=9, **DIVIDES), tmp_path_factory.mktemp("base") / "model", "bfloat16"
    )


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("float8")
    return {scheme.name: save_quantized(base, place / scheme.name, scheme, "absmax") for scheme in FLOAT8}


def group_of(name: str) -> dict[str, Any]:
    return codec_named(name, SafetensorsCodec).configuration(Ignored())["config_groups"]["group_0"]


def quantizing(module: Any) -> Any:
    """The module, in the state in which compressed-tensors rounds what enters it."""
    module.quantization_status = QuantizationStatus.INITIALIZED
    return module


@pytest.mark.parametrize("name", COMPRESSED)
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 9), power=st.integers(-60, 60), seed=st.integers(0, 2**31))
def test_rounding_is_compressed_tensors(name: str, tokens: int, power: int, seed: int) -> None:
    x = torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x[0, 0, ::3] *= 1e-5
    x[0, -1, :128] = 0
    rule, scheme = activations_of_group(group_of(name)), QuantizationScheme.model_validate(group_of(name))
    assert rule is not None and not rule.unknown
    expected = forward_quantize(quantizing(torch.nn.Module()), x, "input", scheme.input_activations)
    assert torch.equal(rounded(x, rule), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4", "FP8"])
@settings(max_examples=20, deadline=None)
@given(power=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_presets_are_rounded_to_the_bit(preset: str, dtype: torch.dtype, power: int, seed: int) -> None:
    """compressed-tensors' FP4, and e4m3 under a number of the file; the number fits no, or another, magnitude, too."""
    x = torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x[0, 0, ::3] *= 1e-5
    x[0, -1, :128] = 0
    x[1, 3, 5] *= 100
    x = x.to(dtype)
    group = preset_name_to_scheme(preset, ["Linear"])
    module = quantizing(torch.nn.Module())
    bound = x.float().abs().max() * (1 + seed % 3) / 2
    number = generate_gparam(-bound, bound) if preset == "NVFP4" else (bound / 448).reshape(1)
    module.input_global_scale = number if preset == "NVFP4" else None
    module.input_scale = number.to(dtype)
    rule = activations_of_group(
        group.model_dump(mode="json"), float(module.input_scale if preset == "FP8" else number)
    )
    assert rule is not None and not rule.unknown
    expected = forward_quantize(module, x, "input", group.input_activations).to(dtype)
    if preset == "FP8" and dtype == torch.bfloat16:  # of which the quotient is rounded to bfloat16 there
        assert relative_error(rounded(x, rule).float().numpy(), expected.float().numpy()) < 0.05
    else:
        assert torch.equal(rounded(x, rule), expected)


def test_a_tensor_is_one_text() -> None:
    x = torch.randn(3, 5, 64) * torch.tensor([1.0, 100.0, 1e4])[:, None, None]
    together = rounded(x, Activations("tensor"))
    assert torch.equal(together, torch.cat([rounded(row[None], Activations("tensor")) for row in x]))
    assert not torch.equal(rounded(x[0], Activations("tensor")), rounded(x[0], Activations("token")))


def run(loaded: LoadedModel, activations: str) -> np.ndarray:
    backend = with_activations(TORCH, loaded, activations, CPU, torch.float32)
    model = torch_forward.load(loaded.config, loaded.weights, backend=backend)
    with torch.no_grad():
        return torch_forward.forward(model, torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_model_is_transformers(name: str, made: dict[str, Path]) -> None:
    """Its model of the same weights, with compressed-tensors' rounding before every quantized layer."""
    loaded, args = load_model(made[name]), QuantizationScheme.model_validate(group_of(name)).input_activations
    tensors = open_checkpoint(made[name]).tensors
    oracle = random_bamba(seed=9, **DIVIDES)
    with torch.no_grad():
        for key, parameter in oracle.named_parameters():
            parameter.copy_(to_tensor(read_tensor(tensors[key]), torch.float32, CPU))
    exact = transformers_logits(oracle, TOKENS)
    for key, module in oracle.named_modules():
        if isinstance(tensors.get(f"{key}.weight"), PackedTensor):
            quantizing(module).register_forward_pre_hook(
                lambda module, given: (forward_quantize(module, given[0], "input", args),)
            )
    theirs = transformers_logits(oracle, TOKENS)
    assert relative_error(run(loaded, "none"), exact) < 1e-5
    # A digit of float32 decides now and then which of two codes is the nearest.
    assert relative_error(run(loaded, "checkpoint"), theirs) < 0.05 < relative_error(exact, theirs)


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_what_every_scheme_says(scheme: SafetensorsCodec, tmp_path: Path, base: Path) -> None:
    directory = save_quantized(base, tmp_path / "model", scheme, scheme.methods[-1].name)
    rules = {
        t.activations for t in open_checkpoint(directory).tensors.values() if isinstance(t, PackedTensor)
    }
    expected = {
        "fp8-dynamic": Activations("token"),
        "fp8-tensor": Activations("tensor"),
        "fp8-block": Activations("group", 128),
        "fp8-block-inv": Activations("group", 128),
        "nvfp4a4": Activations("nvfp4", 16, scale=1.0),
        "mxfp4a4": Activations("mxfp4", 32),
    }
    assert rules == {expected.get(scheme.name)}
    loaded = load_model(directory)
    backend = with_activations(TORCH, loaded, "checkpoint", CPU, torch.float32)
    if scheme.name in expected:
        assert backend.name == f"torch, activations {expected[scheme.name]} (emulated)"
    else:
        assert backend is TORCH


@contextmanager
def configuration_of(directory: Path) -> Iterator[dict[str, Any]]:
    """The ``quantization_config``, written back as it was changed."""
    config = json.loads((directory / "config.json").read_text())
    yield config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [{"dynamic": False}, {"type": "int"}, {"num_bits": 4}, {"symmetric": False}, {"strategy": "channel"}],
    ids=str,
)
def test_other_roundings_are_refused_by_name(
    change: dict[str, Any], made: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(made["fp8-dynamic"], tmp_path / "model")
    with configuration_of(directory) as config:
        config["config_groups"]["group_0"]["input_activations"] |= change
    loaded = load_model(directory)
    assert with_activations(TORCH, loaded, "none", CPU, torch.float32) is TORCH
    with pytest.raises(BambaQuantError, match=r"is not supported(.|\n)*in_proj.weight: input_activations"):
        with_activations(TORCH, loaded, "checkpoint", CPU, torch.float32)


def test_a_cache_that_is_rounded_otherwise_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(made["fp8-dynamic"], tmp_path / "model")
    with configuration_of(directory) as config:
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    loaded = load_model(directory)
    assert with_activations(TORCH, loaded, "none", CPU, torch.float32) is TORCH
    with pytest.raises(BambaQuantError, match=r"attention cache(.|\n)*kv_cache_scheme"):
        with_activations(TORCH, loaded, "checkpoint", CPU, torch.float32)


def test_groups_that_do_not_divide_a_row_are_refused(made: dict[str, Path]) -> None:
    weights = load_model(made["fp8-block"]).weights
    tensor, rule, _ = weights.stored("model.layers.0.mamba.in_proj.weight")
    odd = dataclasses.replace(tensor, activations=Activations("group", 96))
    with pytest.raises(BambaQuantError, match=r"do not divide(.|\n)*x: \d+ columns, e4m3 by 96"):
        with_fp8_activations(TORCH, LazyWeights({"x": (odd, rule)}, False))


def test_a_gguf_is_rounded_as_llama_cpp_has_it(base: Path, tmp_path: Path) -> None:
    loaded = load_model(to_gguf(base, tmp_path / "model.gguf", "q8_0", vocab=False))
    names = [
        with_activations(TORCH, loaded, kind, CPU, torch.float32).name for kind in ("checkpoint", "llama.cpp")
    ]
    assert names == ["torch, activations as llama.cpp's"] * 2
    assert (
        resolve("auto", ["gguf", "gguf"]) == "llama.cpp"
        and resolve("auto", ["huggingface", "gguf"]) == "none"
    )
    assert resolve("checkpoint", ["gguf"]) == "checkpoint"


@pytest.mark.parametrize(("dtype", "power"), [("bf16", -99), ("f16", -13), ("f32", -99)])
def test_which_scales_let_every_code_come_back(dtype: str, power: int, made: dict[str, Path]) -> None:
    """The least power of two that is taken, and the next, which is left to the emulation."""
    weights = load_model(made["fp8-dynamic"]).weights
    tensor, rule, _ = weights.stored("model.layers.0.mamba.in_proj.weight")
    assert isinstance(tensor, PackedTensor)
    dequantizer = Float8Dequantizer(tensor.columns, tensor.columns, dtype)
    codes = torch.arange(256, dtype=torch.uint8)[torch.arange(256) & 127 != 127]
    for least, taken in ((2.0**power, True), (2.0 ** (power - 1), False)):
        fake = dataclasses.replace(tensor, dequantizer=dequantizer)
        scale = np.full((1, 1), least, np.float32)
        object.__setattr__(fake, "scales", lambda scale=scale: scale)
        found = with_fp8_activations(TORCH, LazyWeights({"x": (fake, rule)}, False), scaled=True)
        assert found.name.endswith("(scaled products)" if taken else "(emulated)")
        if taken:
            weight = torch.from_numpy(dequantizer.values(codes.numpy()[None], scale, scale[:, :0])).bfloat16()
            expected = codes.view(torch.float8_e4m3fn).float()
            assert torch.equal(weight_codes(weight, torch.from_numpy(scale))[0].float(), expected)


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-tensor"])
def test_codes_come_back_from_bfloat16(name: str, made: dict[str, Path]) -> None:
    weights = load_model(made[name]).weights
    for each in weights:
        tensor = weights.stored(each)[0]
        if isinstance(tensor, PackedTensor):
            weight = torch.from_numpy(weights[each]).bfloat16()
            codes = weight_codes(weight, torch.from_numpy(tensor.scales()))
            raw = np.fromfile(tensor.file, np.uint8, tensor.n_bytes, offset=tensor.offset)[: tensor.elements]
            assert np.array_equal(codes.view(torch.uint8).numpy().ravel() & 127, raw & 127)
            assert torch.equal((codes.float() * torch.from_numpy(tensor.scales())).bfloat16(), weight)


def test_every_code_comes_back_from_bfloat16() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].repeat(2000, 1)
    scale = torch.exp(20 * torch.randn(2000, 1).clamp(-4, 4)).bfloat16().float()
    found = weight_codes((codes.float() * scale).bfloat16(), scale)
    assert torch.equal(found.float(), codes.float())


def test_the_scaled_product_is_the_emulated_one(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own on a GPU; elsewhere its definition stands in, and operands and scales are checked."""
    if not has_scaled_products(DEVICE, torch.bfloat16):
        monkeypatch.setattr(torch, "_scaled_mm", _scaled_mm)
    for name in ("fp8-dynamic", "fp8-tensor"):
        weights = load_model(made[name]).weights
        matrix = "model.layers.0.mamba.in_proj.weight"
        tensor = weights.stored(matrix)[0]
        assert isinstance(tensor, PackedTensor) and tensor.activations is not None
        weight = torch.from_numpy(weights[matrix]).bfloat16().to(DEVICE)
        scale = torch.from_numpy(tensor.scales()).to(DEVICE)
        x = (
            torch.randn(2, 7, weight.shape[1], generator=torch.Generator().manual_seed(0))
            .bfloat16()
            .to(DEVICE)
        )
        codes, by_token = quantized(x, tensor.activations)
        truth = (codes.double() * by_token) @ (weight_codes(weight, scale).double() * scale).T
        found = scaled_product(x, weight_codes(weight, scale), scale, tensor.activations)
        assert found.dtype == torch.bfloat16
        assert relative_error(found.cpu(), truth.cpu()) < 2.0**-8
        backend = with_fp8_activations(TORCH, weights, scaled=True)
        assert backend.name.endswith("(scaled products)")
        bias = torch.randn(len(weight)).bfloat16().to(DEVICE)
        for _ in range(2):
            assert torch.equal(backend.linear(x, weight, None, matrix), found)
            assert torch.equal(backend.linear(x, weight, bias, matrix), found + bias)


def _scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, **options: Any
) -> torch.Tensor:
    assert a.is_contiguous() and b.t().is_contiguous() and a.dtype == b.dtype == torch.float8_e4m3fn
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    assert scale_a.dtype == scale_b.dtype == torch.float32 and not options["use_fast_accum"]
    return ((a.float() @ b.float()) * scale_a * scale_b).to(options["out_dtype"])


def test_an_evaluation_says_what_it_rounded(files: dict[str, Path], text: Path, tmp_path: Path) -> None:
    write_plan(plan_quantization(embedded_model(), "fp8-dynamic"), tmp_path / "float8")
    few = dataclasses.replace(OPTIONS, chunks=4, floor_chunks=2, drift_chunks=1, backend="numba")
    kld = {}
    for kind in ("none", "checkpoint"):
        options = dataclasses.replace(few, activations=kind)
        found = evaluate(embedded_model(), [tmp_path / "float8", files["q8_0"]], text, options)
        assert found.run.options["activations"] == kind
        kld[kind] = [candidate.figures["kld_mean"].value for candidate in found.candidates]
    assert (
        found.run.backend
        == "numba; numba, activations e4m3 by token (emulated); numba, activations as llama.cpp's"
    )
    assert all(1.2 * exact < rounded for exact, rounded in zip(kld["none"], kld["checkpoint"], strict=True))
