"""Scales of an FP8 cache in a directory: measured, written, read, and used as compressed-tensors uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bamba_quant.calibration.cache_ranges import CacheRanges
from bamba_quant.calibration.imatrix import collect
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.evaluation.activations import with_activations
from bamba_quant.evaluation.stored_types import cache_scales
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference import model as numpy_model
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from tests.reference.cases import relative_error
from tests.support.command import run
from tests.support.conversion import random_tokens
from tests.support.families import save, wide_case

TOKENS = np.array(random_tokens(160, 60))
# Attention as self_attn beside Mamba's layers, in every layer, and as mixer.
MODELS = [("bamba", "plain"), ("falcon_h1", "plain"), ("nemotron_h", "groups of experts")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "case"), MODELS)
def test_a_directory_with_scales_is_transformers(name: str, case: str, tmp_path: Path) -> None:
    """Scales are the largest keys and values by 448; its logits are those of transformers with its quantized cache."""
    source = save(wide_case(name, case), tmp_path / "model", dtype="bfloat16")
    loaded, ranges = load_model(source), CacheRanges()
    collect(loaded, TOKENS[None], (), cache=ranges)
    state = numpy_model.NumpyState()
    numpy_model.forward(loaded.config, loaded.weights, TOKENS, state=state)
    for (layer, block), kept in state.blocks.items():
        if block == "attention" and kept:
            expected = [np.abs(each).max() / 448 for each in kept]
            np.testing.assert_allclose(ranges.scales()[f"model.layers.{layer}."], expected, rtol=1e-4)
    # An eighth of them, so that large numbers are cut too.
    smaller = {layer: (k / 8, v / 8) for layer, (k, v) in ranges.scales().items()}
    plan = plan_quantization(source, "w8a16-g32", cache_scales=smaller, max_shard_bytes=60_000)
    write_plan(plan, tmp_path / "quantized")
    assert len(plan.shards) > 1 and any("--kv-cache-dtype fp8" in note for note in plan.notes)
    found = load_model(tmp_path / "quantized")
    stored = cache_scales(found)
    assert stored.keys() == smaller.keys()
    for layer, pair in stored.items():  # bfloat16, rounded up
        assert all(0 <= got / given - 1 < 2**-7 for got, given in zip(pair, smaller[layer], strict=True))
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert args is not None and (args.num_bits, args.type, args.strategy, args.dynamic) == (
        8,
        "float",
        "tensor",
        False,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)[None]).logits[0]
        exact, rounded = (
            torch_forward.forward(
                torch_forward.load(
                    found.config,
                    found.weights,
                    backend=with_activations(TORCH, found, activations, torch.device("cpu"), torch.float32),
                ),
                TOKENS[None],
            ).logits[0]
            for activations in ("none", "checkpoint")
        )
    # A digit of float32 decides now and then which of two codes is the nearest.
    assert relative_error(rounded, expected) < 0.02 < 2 * relative_error(exact, expected)


def test_refusals(tmp_path: Path) -> None:
    source = save(wide_case("bamba", "plain"), tmp_path / "model", dtype="bfloat16")
    with pytest.raises(PlanError, match="no scales of a cache"):
        plan_quantization(source, "torchao-int4-g64", cache_scales={})
    with pytest.raises(PlanError, match="no attention layer"):
        plan_quantization(
            save(wide_case("mamba2", "plain"), tmp_path / "mamba2"), "w8a16-g32", cache_scales={}
        )
    write_plan(plan_quantization(source, "w8a16-g32", cache_scales={}), tmp_path / "quantized")
    assert set(cache_scales(load_model(tmp_path / "quantized")).values()) == {(1.0, 1.0)}
    for change, match in (
        (lambda tensors, name: tensors.pop(name), "are missing"),
        (lambda tensors, name: tensors.update({name: torch.zeros(1)}), "not one positive number"),
        (lambda tensors, name: tensors.update({name: torch.ones(2)}), r"shape \(2,\)"),
    ):
        damaged = Path(shutil.copytree(tmp_path / "quantized", tmp_path / "damaged", dirs_exist_ok=True))
        file = damaged / "model.safetensors"
        tensors = load_file(file)
        change(tensors, next(name for name in tensors if name.endswith("v_scale")))
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(BambaQuantError, match=match):
            cache_scales(load_model(damaged))
    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as tensors:
        scales = [name for name in tensors.keys() if name.endswith(("k_scale", "v_scale"))]  # noqa: SIM118
        assert scales and all(tensors.get_tensor(name).dtype == torch.bfloat16 for name in scales)


def test_the_commands_measure_the_scales(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The keys and the values of a text are all that attention reads of it. " * 100)
    asked = ("--calibrate", text, "--calibrate-chunks", 2, "--kv-cache", "fp8")
    for command, options in (("fp8", ("--scheme", "tensor")), ("int4", ("--bits", 8)), ("fp4", ())):
        run(command, embedded_model(), tmp_path / command, *options, *asked)
        stored = cache_scales(load_model(tmp_path / command))
        assert stored and all(0 < scale < 1 for pair in stored.values() for scale in pair)
    missing = run("int4", embedded_model(), tmp_path / "none", "--kv-cache", "fp8", code=2)
    assert "--calibrate" in missing.stderr and not (tmp_path / "none").exists()
