"""FP8, integer and FP4 directories of every family: transformers loads them and computes what their weights mean.

Where a release of transformers cannot, a test shows its failure, and that the plan and the card say what to do.
"""

from __future__ import annotations

import json
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
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
from bamba_reference.torch import forward as torch_forward
from tests.planning.test_quantized_models import assert_near, through_fp8
from tests.support import directories, vllm
from tests.support.conversion import random_tokens, to_gguf, transformers_logits
from tests.support.families import FAMILIES, random_case, save, wide_case
from tests.support.quantized import int4_kernel

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
MODELS = [
    ("granitemoehybrid", "plain"),
    ("granitemoehybrid", "six experts"),
    ("granitemoehybrid", "attention alone"),
    ("nemotron_h", "groups of experts"),
    ("mamba2", "tied"),
    ("mamba", "plain"),
    ("falcon_mamba", "plain"),
    ("jamba", "plain"),
    ("falcon_h1", "plain"),
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
# Whose experts checkpoints store one by one.
ONE_BY_ONE = ("jamba", "nemotron_h")
# Whose initialization takes hold of a weight that a packed layer has not.
TOUCHED = ["mamba2", "mamba", "falcon_mamba"]
TOKENS = random_tokens(160, 60)


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
    return key.replace("model.", "backbone.", 1) if name == "nemotron_h" else key


def reference_logits(directory: Path) -> np.ndarray:
    found = load_model(directory)
    ready = torch_forward.load(found.config, found.weights)
    with torch.no_grad():
        return torch_forward.forward(ready, torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(
    ("name", "case", "scheme"),
    # Experts with zero points do not load.
    [
        (*one, scheme)
        for one in MODELS
        for scheme in COMPRESSED
        if one[0] not in ONE_BY_ONE or scheme not in ("w4a16-asym-g64", "nvfp4a16")
    ],
)
def test_weights_alone(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    """Dequantized while loading: the reference's logits on the weights that this package reads back."""
    directory, _ = made(name, case, scheme, tmp_path)
    found = transformers_logits(loaded(directory, torch.float32, dequantize=True), TOKENS)
    assert_near(found, reference_logits(directory), 1e-5)
    original = transformers_logits(model(name, case), TOKENS)
    assert np.linalg.norm(found - original) > 1e-3 * np.linalg.norm(original)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize(("name", "case"), MODELS)
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


@pytest.mark.parametrize(("name", "case"), MODELS)
def test_transformers_own_form(name: str, case: str, tmp_path: Path) -> None:
    dtype: Any
    # Dequantized experts are bfloat16, which a float32 model cannot multiply by.
    dtype, tolerance = ("bfloat16", 0.1) if name in ONE_BY_ONE else ("float32", 1e-5)
    source = save(model(name, case), tmp_path / "model", dtype=dtype)
    plan = plan_quantization(source, "fp8-block-inv", dtype="stored")
    write_plan(plan, tmp_path / "quantized")
    found = transformers_logits(loaded(tmp_path / "quantized", getattr(torch, dtype)), TOKENS)
    assert_near(found, reference_logits(tmp_path / "quantized"), tolerance)


def test_experts_are_left_alone_on_a_gpu_too(tmp_path: Path) -> None:
    """Where transformers does not dequantize, it replaces modules by name, experts among them."""
    directory, plan = made("granitemoehybrid", "six experts", "fp8-block-inv", tmp_path)
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


@pytest.mark.parametrize(
    ("name", "case", "scheme"),
    [
        (*one, scheme)
        for one in [("nemotron_h", "plain"), *MODELS]
        for scheme in PACKED
        if one[0] not in TOUCHED and (one[0] not in ONE_BY_ONE or scheme != "nvfp4a16")
    ],
)
def test_packed_weights_load_as_they_are(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, scheme, tmp_path)
    assert not any("CompressedTensorsConfig" in note for note in plan.notes)
    packed, plain = (
        transformers_logits(loaded(directory, torch.bfloat16, dequantize), TOKENS)
        for dequantize in (False, True)
    )
    if name == "jamba":  # whose class, where quantized, adds dt_proj's bias and takes it off, in bfloat16
        assert_near(packed, plain, 0.1)
    else:
        np.testing.assert_array_equal(packed, plain)


@pytest.mark.parametrize(("scheme", "lost"), [("nvfp4a16", True), ("mxfp4a16", False)])
def test_transformers_loses_global_scales_of_experts(scheme: str, lost: bool, tmp_path: Path) -> None:
    """transformers 5.23's ``CompressedTensorsDequantize`` takes none; where this fails, its fault is mended."""
    directory, plan = made("jamba", "plain", scheme, tmp_path)
    stored = directories.tensors(directory)
    ours = directories.dequantized(plan, stored)
    name = next(name for name in ours if name.endswith("experts.0.down_proj.weight"))
    module, _, leaf = name.removesuffix(".weight").partition(".0.")
    found = loaded(directory, torch.float32, dequantize=True).state_dict()[f"{module}.{leaf}"][0].numpy()
    factor = float(stored[name.replace("weight", "weight_global_scale")]) if lost else 1.0
    np.testing.assert_allclose(found, ours[name] * np.float32(factor), rtol=1e-2)
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
    directory, plan = made(name, "plain", scheme, tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        loaded(directory, torch.bfloat16)
    (note,) = (note for note in plan.notes if "CompressedTensorsConfig(dequantize=True)" in note)
    assert "--ignore ssm_out" in note
    assert note in (directory / "README.md").read_text()


@pytest.mark.parametrize("name", TOUCHED)
def test_integers_load_where_out_proj_stays(name: str, tmp_path: Path) -> None:
    """Not to the bit: FalconMamba's class, where quantized, adds dt_proj's bias and takes it off, in bfloat16."""
    directory, plan = made(name, "plain", "w4a16-g128", tmp_path, keep=["ssm_out"])
    assert not any("CompressedTensorsConfig" in note for note in plan.notes)
    found = transformers_logits(loaded(directory, torch.bfloat16), TOKENS)
    assert_near(found, reference_logits(directory), 0.03)


@pytest.mark.parametrize("name", ["granitemoehybrid", "mamba"])
def test_packed_zero_points_fail_to_load(name: str, tmp_path: Path) -> None:
    directory, plan = made(name, "plain", "w4a16-asym-g64", tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(directory, torch.bfloat16)
    assert any("CompressedTensorsConfig(dequantize=True)" in note for note in plan.notes)


def test_torchao_tensors_of_renamed_modules_fail_to_load(tmp_path: Path) -> None:
    directory, plan = made("nemotron_h", "groups of experts", "torchao-int4-g64", tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):
        loaded(directory, torch.bfloat16)
    assert any("does not load torchao's" in note for note in plan.notes)


@pytest.mark.parametrize(("name", "case"), [pair for pair in MODELS if pair[0] != "nemotron_h"])
def test_torchao_tensors_load(name: str, case: str, tmp_path: Path) -> None:
    directory, plan = made(name, case, "torchao-int4-g64", tmp_path)
    network = loaded(directory, torch.bfloat16)
    packed = [key for key, value in network.named_parameters() if isinstance(value.data, Int4Tensor)]
    assert len(packed) == len(plan.matrices)
    with int4_kernel():
        found = transformers_logits(network, TOKENS)
    # Arithmetic in bfloat16, whose roundings now and then send a token to another expert.
    assert_near(found, reference_logits(directory), 0.1)


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


# Every part of in_proj is whole blocks high: 2 · 256 + 2 · 2 · 64 + 128 rows.
WHOLE_PARTS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128, "mamba_d_head": 2},
    "falcon_h1": {"mamba_d_state": 64, "mamba_n_groups": 2, "mamba_n_heads": 128, "mamba_d_head": 2},
    "nemotron_h": {"ssm_state_size": 64, "mamba_num_heads": 128, "mamba_head_dim": 2},
    "mamba2": {"state_size": 64, "n_groups": 2, "num_heads": 128, "head_dim": 2},
}


@pytest.mark.parametrize("keep", [[], ["ssm_out"], ["*.layers.0.*"]], ids=["all", "ssm_out", "layer 0"])
@pytest.mark.parametrize("scheme", [*COMPRESSED, "fp8-block-inv"])
@pytest.mark.parametrize(("name", "case"), [pair for pair in MODELS if pair[0] in WHOLE_PARTS])
def test_vllm_would_load(name: str, case: str, scheme: str, keep: list[str], tmp_path: Path) -> None:
    family = FAMILIES[name]
    if keep == ["ssm_out"] and case == "attention alone":
        keep = ["attn_output"]
    network = family.random(
        **{**family.small.multiples_of_128, **WHOLE_PARTS[name], **family.small.cases[case]}
    )
    source = save(network, tmp_path / "model", dtype="bfloat16")
    plan = plan_quantization(source, scheme, keep=keep)
    shapes = {part.name: part.shape for shard in plan.shards for part in shard.parts}
    config = json.loads(plan.files["config.json"])
    scales = {key: np.ones(shape) for key, shape in shapes.items() if "scale" in key}
    assert vllm.check(config, shapes, scales) == len(plan.matrices)
    assert not any("vLLM" in note for note in plan.notes)
    if keep or case == "six experts":
        key = "modules_to_not_convert" if scheme == "fp8-block-inv" else "ignore"
        config["quantization_config"][key] = ["lm_head"]
        with pytest.raises(vllm.RefusalError, match=r"experts|out_proj|o_proj|layers\.0\."):
            vllm.check(config, shapes, scales)


EXPERTS = FAMILIES["granitemoehybrid"].small.cases["six experts"]
# Each breaks blocks of one product, by the role that says which, or none; bamba's gate and up have whole blocks
# wherever down_proj's columns have.
CUT: list[tuple[str, dict[str, Any], str]] = [
    ("bamba", {"mamba_d_state": 128, "num_key_value_heads": 4}, ""),
    ("bamba", {"mamba_d_state": 128, "num_key_value_heads": 2}, "attn_k"),
    ("bamba", {"mamba_d_state": 64, "num_key_value_heads": 4}, "ssm_in"),
    ("granitemoehybrid", {"mamba_d_state": 128}, ""),
    ("granitemoehybrid", {"mamba_d_state": 128, "num_key_value_heads": 1}, "attn_k"),
    ("granitemoehybrid", {"mamba_d_state": 128, "shared_intermediate_size": 192}, "ffn_gate"),
    (
        "granitemoehybrid",
        {"mamba_d_state": 128, "shared_intermediate_size": 192, **EXPERTS},
        "ffn_gate_shexp",
    ),
    ("granitemoehybrid", {"mamba_d_state": 64}, "ssm_in"),
    ("falcon_h1", {"mamba_d_state": 128, "num_key_value_heads": 1}, "attn_k"),
    ("falcon_h1", {"mamba_d_state": 64}, "ssm_in"),
    ("nemotron_h", {"ssm_state_size": 64}, ""),
    ("nemotron_h", {"ssm_state_size": 56}, "ssm_in"),
    ("mamba2", {"state_size": 128}, ""),
    ("mamba2", {"state_size": 32}, "ssm_in"),
]


@pytest.mark.parametrize(("name", "sizes", "role"), CUT, ids=[f"{name} {role}" for name, _, role in CUT])
def test_a_plan_says_where_vllm_refuses_blocks(
    name: str, sizes: dict[str, Any], role: str, tmp_path: Path
) -> None:
    """It says so where vLLM's rules refuse, and nowhere else; what it says to keep makes vLLM take the rest."""
    family = FAMILIES[name]
    family.config(**{**family.small.multiples_of_128, **sizes}).save_pretrained(tmp_path)
    # 192 columns are no whole groups of activations.
    keep = [role.replace("gate", "down")] if "ffn" in role else []

    def plan(scheme: str, keep: list[str]) -> tuple[list[str], bool]:
        found = plan_quantization(tmp_path, scheme, keep=keep, allow_config_only=True)
        shapes = {part.name: part.shape for shard in found.shards for part in shard.parts}
        scales = {key: np.ones(shape) for key, shape in shapes.items() if "scale" in key}
        notes = [note for note in found.notes if "vLLM refuses" in note]
        assert all(note in found.files["README.md"].decode() for note in notes)
        try:
            vllm.check(json.loads(found.files["config.json"]), shapes, scales)
        except vllm.RefusalError:
            return notes, True
        return notes, False

    notes, refused = plan("fp8-block", keep)
    assert refused == bool(role)
    assert len(notes) == refused
    assert plan("fp8-dynamic", []) == ([], False)
    if notes:
        advice = notes[0].split("keep these matrices: ")[1].removeprefix("--ignore ").split(" --ignore ")
        assert role in advice
        assert plan("fp8-block", [*keep, *advice]) == ([], False)


@pytest.mark.parametrize(("scheme", "keep"), [("w4a16-asym-g64", []), ("w4a16-g128", sorted(EXPERT_ROLES))])
def test_packed_weights_beside_other_experts_fail_to_load(
    scheme: str, keep: list[str], tmp_path: Path
) -> None:
    """transformers 5.23 looks for packed experts without zero points; where this passes, its fault is mended."""
    directory, plan = made("jamba", "plain", scheme, tmp_path, keep=keep)
    for dequantize in (False, True):
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            loaded(directory, torch.bfloat16, dequantize)
    assert any("quantize the experts by a symmetric scheme" in note for note in plan.notes)
    assert np.isfinite(reference_logits(directory)).all()


def test_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    """Each by its own scales and its own importance, and all of a layer or none."""
    source = save(model("jamba", "plain"), tmp_path / "model")
    stacks = {f"blk.{i}.ffn_{kind}_exps.weight" for i in (1, 3) for kind in ("gate", "up", "down")}
    importance = np.random.default_rng(0).uniform(0.1, 1, (6, 128)).astype(np.float32)
    imatrix = Imatrix(None, {name: importance.reshape(-1) for name in stacks}, "", 1)
    plan = plan_quantization(source, "w4a16-g128", imatrix=imatrix)
    rows = {row.name: row for row in plan.matrices if "experts" in row.name}
    assert len(rows) == 36
    for name, row in rows.items():
        np.testing.assert_array_equal(row.importance, importance[int(name.split(".")[5])])
    ignored = plan_quantization(source, "w4a16-g128", keep=sorted(EXPERT_ROLES))
    assert not any("experts" in row.name for row in ignored.matrices)
    with pytest.raises(PlanError, match="a loader fuses"):
        plan_quantization(source, "w4a16-g128", keep=["*.experts.3.*"])


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_vllm_does_not_quantize_mamba(name: str, tmp_path: Path) -> None:
    plan = plan_quantization(save(model(name, "plain"), tmp_path / "model"), "fp8-dynamic")
    with pytest.raises(vllm.RefusalError, match="MambaMixer"):
        vllm.check(json.loads(plan.files["config.json"]), {}, {})
    assert any("vLLM has no quantized layers" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
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


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-tensor", "w4a16-asym-g64"])
@pytest.mark.parametrize(("name", "case"), MODELS)
def test_a_gguf_of_what_was_quantized(name: str, case: str, scheme: str, tmp_path: Path) -> None:
    """Granite's gate and up are one matrix there and two here; each keeps the values it had."""
    directory, _ = made(name, case, scheme, tmp_path)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    assert_near(reference_logits(file), reference_logits(directory), 1e-5)
