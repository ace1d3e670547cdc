"""What releases of transformers cannot load of quantized directories, and that the plan and the card say what to do.

Where one of these tests fails, transformers has mended a fault.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.families.runtime_compat import EXPERTS as EXPERT_ROLES
from bamba_quant.planning.quantize import plan_quantization
from tests.planning.test_quantized_families import (
    PACKED,
    TOKENS,
    TOUCHED,
    loaded,
    made,
    reference_logits,
)
from tests.support import directories
from tests.support.conversion import transformers_logits
from tests.support.families import FAMILIES, KINDS, ONE_BY_ONE, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Whose experts are stacked while they load, under the names that they have on disk.
STACKING = [one for one in ONE_BY_ONE if not FAMILIES[one[0]].family.loaders.renamed]


@pytest.mark.parametrize(("scheme", "lost"), [("nvfp4a16", True), ("mxfp4a16", False)])
@pytest.mark.parametrize(("name", "case"), STACKING)
def test_transformers_loses_global_scales_of_experts(
    name: str, case: str, scheme: str, lost: bool, tmp_path: Path
) -> None:
    """transformers 5.23's ``CompressedTensorsDequantize`` takes none; where this fails, its fault is mended."""
    directory, plan = made(name, case, scheme, tmp_path)
    stored = directories.tensors(directory)
    ours = directories.dequantized(plan, stored)
    one = next(key for key in ours if key.endswith("experts.0.down_proj.weight"))
    module, _, leaf = one.removesuffix(".weight").partition(".0.")
    found = loaded(directory, torch.float32, dequantize=True).state_dict()[f"{module}.{leaf}"][0].numpy()
    factor = float(stored[one.replace("weight", "weight_global_scale")]) if lost else 1.0
    np.testing.assert_allclose(found, ours[one] * np.float32(factor), rtol=1e-2)
    assert factor == 1 or factor > 100
    # vLLM multiplies by one global scale for the gate and up of an expert (``CompressedTensorsW4A4Nvfp4MoEMethod``).
    scales = {key: float(value) for key, value in stored.items() if key.endswith("weight_global_scale")}
    gates = {key: scale for key, scale in scales.items() if "experts" in key and "gate_proj" in key}
    assert all(scales[key.replace("gate_proj", "up_proj")] == scale for key, scale in gates.items())
    assert (len(gates), len(set(gates.values())) > 1) == ((12, True) if lost else (0, False))
    assert any("leaves out the global scales of experts" in note for note in plan.notes) == lost


@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("name", TOUCHED)
def test_packed_out_proj_fails_to_load(name: str, scheme: str, tmp_path: Path) -> None:
    """transformers 5.23 initializes ``out_proj.weight`` while it loads; where this passes, its fault is mended."""
    directory, plan = made(name, FAMILIES[name].small.kinds[0], scheme, tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        loaded(directory, torch.bfloat16)
    (note,) = (note for note in plan.notes if "CompressedTensorsConfig(dequantize=True)" in note)
    assert "--ignore ssm_out" in note
    assert note in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "case"),
    [one for one in KINDS if one not in ONE_BY_ONE and not FAMILIES[one[0]].family.loaders.renamed],
)
def test_packed_zero_points_fail_to_load(name: str, case: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, "w4a16-asym-g64", tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(directory, torch.bfloat16)
    assert any("CompressedTensorsConfig(dequantize=True)" in note for note in plan.notes)


@pytest.mark.parametrize(("name", "case"), [one for one in KINDS if FAMILIES[one[0]].family.loaders.renamed])
def test_torchao_tensors_of_renamed_modules_fail_to_load(name: str, case: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, "torchao-int4-g64", tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):
        loaded(directory, torch.bfloat16)
    assert any("does not load torchao's" in note for note in plan.notes)


@pytest.mark.parametrize("name", TOUCHED)
@pytest.mark.parametrize("rescale", [False, True])
def test_transformers_rescales_what_it_has_loaded(name: str, rescale: bool, tmp_path: Path) -> None:
    """With rescale_prenorm_residual even an unquantized out_proj; where this fails, transformers has mended it."""
    family = FAMILIES[name]
    network = family.random(**family.small.multiples_of_128, rescale_prenorm_residual=rescale)
    source = save(network, tmp_path / "model")
    found = transformers_logits(loaded(source, torch.float32), TOKENS)
    original = transformers_logits(network, TOKENS)
    apart = np.linalg.norm(found - original) / np.linalg.norm(original)
    assert apart > 0.1 if rescale else apart < 1e-6
    plan = plan_quantization(source, "fp8-dynamic")
    assert any("rescale_prenorm_residual" in note for note in plan.notes) == rescale


@pytest.mark.parametrize(("scheme", "keep"), [("w4a16-asym-g64", []), ("w4a16-g128", sorted(EXPERT_ROLES))])
@pytest.mark.parametrize(("name", "case"), STACKING)
def test_packed_weights_beside_other_experts_fail_to_load(
    name: str, case: str, scheme: str, keep: list[str], tmp_path: Path
) -> None:
    """transformers 5.23 looks for packed experts without zero points; where this passes, its fault is mended."""
    directory, plan = made(name, case, scheme, tmp_path, keep=keep)
    for dequantize in (False, True):
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            loaded(directory, torch.bfloat16, dequantize)
    assert any("quantize the experts by a symmetric scheme" in note for note in plan.notes)
    assert np.isfinite(reference_logits(directory)).all()
