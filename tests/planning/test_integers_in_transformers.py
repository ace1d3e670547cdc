"""transformers loads what ``int4`` and ``fp4`` write, and computes what the reference does on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization import Int4Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bamba_quant.embedded import embedded_model
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.torch.forward import forward, load
from tests.support.conversion import random_tokens, transformers_logits
from tests.support.quantized import int4_kernel

TOKENS = random_tokens(2048, 48)
CPU = torch.device("cpu")
SYMMETRIC = ("w4a16-g128", "w8a16-g64")
FP4 = ("nvfp4a16", "mxfp4a16")
ASYMMETRIC = ("w4a16-asym-g128", "w8a16-asym-g32")
TORCHAO = ("torchao-int4-g128", "torchao-int4-g32")


Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """bamba-mini under a scheme, in two shards."""

    @cache
    def make(scheme: str) -> Path:
        plan = plan_quantization(embedded_model(), scheme, max_shard_bytes=2_000_000)
        assert len(plan.shards) > 1
        write_plan(plan, directory := tmp_path_factory.mktemp(scheme) / "model")
        return directory

    return make


def loaded(directory: Path, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()


def assert_right(directory: Path, *found: torch.nn.Module) -> None:
    """The same bits as transformers' plain model with our weights; the reference's logits but for bf16 arithmetic."""
    weights = load_model(directory).weights
    plain = loaded(embedded_model())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(weights[name], np.float32)))
    expected = transformers_logits(plain, TOKENS)
    for model in found:
        np.testing.assert_array_equal(transformers_logits(model, TOKENS), expected)
    assert_near_reference(directory, expected)


def assert_near_reference(directory: Path, logits: np.ndarray) -> None:
    model = load_model(directory)
    arrays = {name: np.asarray(model.weights[name]) for name in model.weights}
    ready = load(model.config, arrays, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = forward(ready, np.array([TOKENS])).logits[0].float()
    p, q = (torch.log_softmax(scores, -1) for scores in (expected, torch.from_numpy(logits)))
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    # Two roundings to bf16 apart in each layer; a wrong scale in one matrix costs hundreds of times that.
    assert divergence < 2e-3
    assert (q - p).norm() < 0.02 * p.norm()


@pytest.mark.parametrize("scheme", (*SYMMETRIC, *ASYMMETRIC, *FP4))
def test_packed_weights_load(scheme: str, written: Written) -> None:
    """Dequantized, and as they are where they are symmetric."""
    directory = written(scheme)
    models = [loaded(directory, quantization_config=CompressedTensorsConfig(dequantize=True))]
    assert_right(directory, *models, *([] if scheme in ASYMMETRIC else [loaded(directory)]))


def test_zero_points_fail_to_load_packed(written: Written) -> None:
    """compressed-tensors 0.20 does not expect its own packed zero points; where this passes, its fault is mended."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(written(ASYMMETRIC[0]))


@pytest.mark.parametrize("scheme", TORCHAO)
def test_torchao_tensors_load(scheme: str, written: Written) -> None:
    directory = written(scheme)
    model = loaded(directory)
    packed = [name for name, p in model.named_parameters() if isinstance(p.data, Int4Tensor)]
    assert len(packed) == len(plan_quantization(embedded_model(), scheme).matrices)
    with int4_kernel():
        assert_near_reference(directory, transformers_logits(model, TOKENS))


@pytest.mark.parametrize("scheme", ["torchao-int4-g128", "torchao-int4-tile-packed-g128"])
def test_torchao_tensors_need_their_kernels(scheme: str, written: Written) -> None:
    plan = plan_quantization(embedded_model(), scheme)
    assert any("on a CPU" in note for note in plan.notes)
    assert b"on a CPU" in plan.files["README.md"]
    model = loaded(written(scheme))
    with pytest.raises((AttributeError, NotImplementedError), match=r"mslk|int4pack_mm"):
        transformers_logits(model, TOKENS)
