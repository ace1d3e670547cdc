"""FP8, integer and FP4 directories of every family: transformers loads them and computes what their weights mean."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization import Int4Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from bamba_quant.checkpoint.imatrix import Imatrix
from bamba_quant.errors import PlanError
from bamba_quant.families.runtime_compat import EXPERTS as EXPERT_ROLES
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.model import open_model
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.torch import forward as torch_forward
from tests.planning.test_quantized_models import assert_near, through_fp8
from tests.support import directories
from tests.support.conversion import random_tokens, to_gguf, transformers_logits
from tests.support.families import (
    FAMILIES,
    KINDS,
    ONE_BY_ONE,
    RICHEST,
    STACKED,
    random_case,
    sampled,
    save,
    wide_case,
)
from tests.support.quantized import int4_kernel

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
COMPRESSED = [
    "fp8-dynamic",
    "fp8-tensor",
    "fp8-block",
    "w4a16-g128",
    "w4a16-asym-g64",
    "w8a16-g32",
    "nvfp4a16",
]
PACKED = ["w4a16-g128", "w8a16-g32", "nvfp4a16"]
# Experts that checkpoints store one by one do not load with zero points or global scales.
NOT_OF_EXPERTS = ("w4a16-asym-g64", "nvfp4a16")
# Families whose initialization takes hold of a weight that a packed layer has not.
TOUCHED = [name for name, family in FAMILIES.items() if family.family.loaders.initialized]
TOKENS = random_tokens(160, 60)


def with_schemes(kinds: list[tuple[str, str]], schemes: list[str], count: int) -> list[tuple[Any, ...]]:
    """Each kind with some of the schemes that load."""
    drawn = sampled(kinds, schemes, count)
    return [one for one in drawn if one[:2] not in ONE_BY_ONE or one[2] not in NOT_OF_EXPERTS]


@cache
def model(name: str, case: str) -> Any:
    return wide_case(name, case)


def made(name: str, case: str, scheme: str, place: Path, **options: Any) -> tuple[Path, Plan]:
    source = save(model(name, case), place / "model", dtype="bfloat16")
    plan = plan_quantization(source, scheme, **options)
    write_plan(plan, place / "quantized")
    return place / "quantized", plan


def loaded(directory: Path, dtype: torch.dtype, dequantize: bool = False) -> Any:
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **config).eval()
    # Of a float32 model it rounds dequantized experts to bfloat16 or does not, and leaves some in bfloat16.
    for key, parameter in network.named_parameters():
        if parameter.dim() == 3 and "experts" in key and dequantize:
            parameter.data = parameter.to(torch.bfloat16).to(dtype)
    return network


def on_disk(name: str, key: str) -> str:
    """The name in a checkpoint of a module that transformers calls ``key``."""
    return key.replace("model.", "backbone.", 1) if FAMILIES[name].family.loaders.renamed else key


def reference_logits(directory: Path) -> np.ndarray:
    found = load_model(directory)
    ready = torch_forward.load(found.config, found.weights)
    with torch.no_grad():
        return torch_forward.forward(ready, torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(("name", "case", "scheme"), with_schemes(KINDS, COMPRESSED, 3))
def test_weights_alone(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    """Dequantized while loading: the reference's logits on the weights that this package reads back."""
    directory, _ = made(name, case, scheme, tmp_path)
    found = transformers_logits(loaded(directory, torch.float32, dequantize=True), TOKENS)
    assert_near(found, reference_logits(directory), 1e-5)
    original = transformers_logits(model(name, case), TOKENS)
    assert np.linalg.norm(found - original) > 1e-3 * np.linalg.norm(original)


@pytest.mark.parametrize(("name", "case", "scheme"), sampled(KINDS, ["fp8-dynamic", "fp8-block"], 1))
def test_weights_and_activations(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    """As transformers loads FP8 by default: activations pass through FP8 before each quantized layer alone."""
    directory, plan = made(name, case, scheme, tmp_path)
    network = loaded(directory, torch.float32)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    modules = {on_disk(name, key): module for key, module in network.named_modules()}
    for key, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, args, out, key=on_disk(name, key): seen.update({key: (args[0], out)})
            )
    assert np.isfinite(transformers_logits(network, TOKENS)).all()
    weights = directories.dequantized(plan, directories.tensors(directory))
    quantized = {matrix.source.name.removesuffix(".weight") for matrix in plan.matrices}
    # Experts are dequantized while loading.
    assert {name for name in quantized if "experts" not in name} <= seen.keys()
    for key, (x, out) in seen.items():
        module = modules[key]
        if key not in quantized:
            assert torch.equal(out, torch.nn.functional.linear(x, module.weight, module.bias)), key
            continue
        x = through_fp8(x, scheme)
        product = torch.nn.functional.linear(x, torch.from_numpy(weights[f"{key}.weight"]), module.bias)
        assert_near(out.detach().numpy(), product.detach().numpy(), 3e-3)


@pytest.mark.parametrize(("name", "case"), [one for one in KINDS if one not in ONE_BY_ONE or one in RICHEST])
def test_transformers_own_form(name: str, case: str, tmp_path: Path) -> None:
    dtype: Any
    # Dequantized experts are bfloat16, which a float32 model cannot multiply by.
    dtype, tolerance = ("bfloat16", 0.1) if (name, case) in ONE_BY_ONE else ("float32", 1e-5)
    source = save(model(name, case), tmp_path / "model", dtype=dtype)
    plan = plan_quantization(source, "fp8-block-inv", dtype="stored")
    write_plan(plan, tmp_path / "quantized")
    found = transformers_logits(loaded(tmp_path / "quantized", getattr(torch, dtype)), TOKENS)
    assert_near(found, reference_logits(tmp_path / "quantized"), tolerance)


@pytest.mark.parametrize(("name", "case"), STACKED)
def test_experts_are_left_alone_on_a_gpu_too(name: str, case: str, tmp_path: Path) -> None:
    """Where transformers does not dequantize, it replaces modules by name, experts among them."""
    directory, plan = made(name, case, "fp8-block-inv", tmp_path)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    understood = FineGrainedFP8Config(
        **{key: value for key, value in config.items() if key not in ("quant_method", "fmt")}
    )
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    replace_with_fp8_linear(network, understood.modules_to_not_convert, understood, pre_quantized=True)
    replaced = {key for key, module in network.named_modules() if type(module).__name__.startswith("FP8")}
    assert replaced == {matrix.source.name.removesuffix(".weight") for matrix in plan.matrices}
    assert any("the experts, 31% of the weights, stay" in note for note in plan.notes)
    assert "block_sparse_moe.input_linear" in (directory / "README.md").read_text()


UNTOUCHED = [(name, case) for name, case in KINDS if name not in TOUCHED]


@pytest.mark.parametrize(("name", "case", "scheme"), with_schemes(UNTOUCHED, PACKED, 2))
def test_packed_weights_load_as_they_are(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, scheme, tmp_path)
    assert not any("CompressedTensorsConfig" in note for note in plan.notes)
    packed, plain = (
        transformers_logits(loaded(directory, torch.bfloat16, dequantize), TOKENS)
        for dequantize in (False, True)
    )
    # Classes of Mamba's mixers, where quantized, add dt_proj's bias and take it off, in bfloat16.
    if "mamba1" in FAMILIES[name].blocks(case):
        assert_near(packed, plain, 0.1)
    else:
        np.testing.assert_array_equal(packed, plain)


@pytest.mark.parametrize("name", TOUCHED)
def test_integers_load_where_out_proj_stays(name: str, tmp_path: Path) -> None:
    """Not to the bit: FalconMamba's class, where quantized, adds dt_proj's bias and takes it off, in bfloat16."""
    directory, plan = made(name, "plain", "w4a16-g128", tmp_path, keep=["ssm_out"])
    assert not any("CompressedTensorsConfig" in note for note in plan.notes)
    found = transformers_logits(loaded(directory, torch.bfloat16), TOKENS)
    assert_near(found, reference_logits(directory), 0.03)


@pytest.mark.parametrize(
    ("name", "case"), [pair for pair in KINDS if not FAMILIES[pair[0]].family.loaders.renamed]
)
def test_torchao_tensors_load(name: str, case: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, "torchao-int4-g64", tmp_path)
    network = loaded(directory, torch.bfloat16)
    packed = [key for key, value in network.named_parameters() if isinstance(value.data, Int4Tensor)]
    assert len(packed) == len(plan.matrices)
    with int4_kernel():
        found = transformers_logits(network, TOKENS)
    # Arithmetic in bfloat16, whose roundings now and then send a token to another expert.
    assert_near(found, reference_logits(directory), 0.1)


@pytest.mark.parametrize(("name", "case"), ONE_BY_ONE)
def test_experts_are_quantized_one_by_one(name: str, case: str, tmp_path: Path) -> None:
    """Each by its own scales and its own importance, and all of a layer or none."""
    source = save(model(name, case), tmp_path / "model")
    rules = [rule for _, rule in open_model(source).pairs if rule.role in EXPERT_ROLES]
    stacks = {str(rule.gguf): rule.shape[0] for rule in rules}
    importance = np.random.default_rng(0).uniform(0.1, 1, (max(stacks.values()), 128)).astype(np.float32)
    imatrix = Imatrix(None, {name: importance.reshape(-1) for name in stacks}, "", 1)
    plan = plan_quantization(source, "w4a16-g128", imatrix=imatrix)
    rows = {row: re.search(r"\.experts\.(\d+)\.", row.name) for row in plan.matrices}
    found = {row: int(number[1]) for row, number in rows.items() if number}
    assert len(found) == sum(stacks.values())
    for row, number in found.items():
        np.testing.assert_array_equal(row.importance, importance[number])
    ignored = plan_quantization(source, "w4a16-g128", keep=sorted({rule.role for rule in rules}))
    assert not any(".experts." in row.name for row in ignored.matrices)
    with pytest.raises(PlanError, match="a loader fuses"):
        plan_quantization(source, "w4a16-g128", keep=["*.experts.3.*"])


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].small.state_spaces])
def test_names_of_state_spaces_are_for_this_package_alone(name: str, tmp_path: Path) -> None:
    network = random_case(name)
    source = save(network, tmp_path / "model", spelling="state-spaces")
    plan = plan_quantization(source, "w8a16-g32")
    write_plan(plan, tmp_path / "quantized")
    assert any("bamba-quant export" in note for note in plan.notes)
    original = transformers_logits(network, TOKENS)
    assert_near(reference_logits(tmp_path / "quantized"), original, 0.1)
    with pytest.raises(ValueError, match="model_type"):
        loaded(tmp_path / "quantized", torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "case", "scheme"), sampled(KINDS, ["fp8-dynamic", "fp8-tensor", "w4a16-asym-g64"], 1)
)
def test_a_gguf_of_what_was_quantized(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    """Gate and up may be one matrix there and two here; each keeps the values it had."""
    directory, _ = made(name, case, scheme, tmp_path)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    assert_near(reference_logits(file), reference_logits(directory), 1e-5)
