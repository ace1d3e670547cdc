"""Weights dequantized on a device are the weights: on a GPU, else with its kernels interpreted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.kernels import DEVICE, needs_triton

needs_triton()

from bamba_quant.embedded import embedded_model
from bamba_quant.inference.loading import load_model
from bamba_quant.inference.weights import DeviceWeights, weights_on
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from tests.support.conversion import to_gguf
from tests.support.families import ONE_BY_ONE, SCALED, save, wide_case


@pytest.mark.parametrize("recipe", ["f16", "q4_k_m", "q8_0"])
def test_of_a_file(recipe: str, tmp_path: Path) -> None:
    """The last one of a model whose rows are scaled."""
    source = save(wide_case(*SCALED[0]), tmp_path / "m") if recipe == "q8_0" else embedded_model()
    loaded = load_model(to_gguf(source, tmp_path / "model.gguf", recipe, vocab=recipe != "q8_0"))
    found = DeviceWeights(loaded.weights, DEVICE, torch.float32)
    assert list(found) == list(loaded.weights)
    assert len(found) == len(loaded.weights)
    on_device = 0
    # A layer with a mixer, one with attention, and what is in none.
    names = [name for name in found if loaded.weights.info(name).layer in (None, 1, 2)]
    for name in names:
        expected, value = loaded.weights[name], found[name]
        if isinstance(value, torch.Tensor):
            on_device += 1
            assert value.device.type == DEVICE.type
            value = value.cpu().numpy()
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype
        # Where a transform is undone, rows come from whole heads.
        some = slice(len(expected) // 3, len(expected) // 2 + 1)
        rows = found.rows(name, some.start, some.stop)
        rows = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows
        np.testing.assert_array_equal(rows, expected[some])
    assert on_device > len(names) / 3


@pytest.mark.parametrize("scheme", ["fp8-block", "w4a16-g128", ""])
def test_experts_that_are_a_tensor_each(scheme: str, tmp_path: Path) -> None:
    directory = save(wide_case(*ONE_BY_ONE[0]), tmp_path / "model", dtype="bfloat16", shards=3)
    if scheme:
        write_plan(plan_quantization(directory, scheme), tmp_path / "quantized")
        directory = tmp_path / "quantized"
    weights = load_model(directory).weights
    found = DeviceWeights(weights, DEVICE, torch.float32)
    names = [name for name in found if ".moe." in name and "router" not in name]
    assert len(names) >= 6
    for name in names:
        np.testing.assert_array_equal(
            found.rows(name, 2, 5).float().cpu(), weights[name][2:5].astype(np.float32)
        )


def test_a_cpu_reads_them_itself() -> None:
    weights = load_model(embedded_model()).weights
    assert weights_on(weights, torch.device("cpu"), torch.float32) is weights
    assert isinstance(weights_on(weights, torch.device("cuda"), torch.float32), DeviceWeights)
