"""Mixtures of schemes in one directory: transformers loads them, vLLM's rules hold, and what cannot be is an error."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from transformers import AutoModelForCausalLM

from bamba_quant.calibration.texts import read_texts, token_chunks
from bamba_quant.checkpoint.imatrix import Imatrix, PlaceholderImatrix
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.evaluation.activations import with_activations
from bamba_quant.inference.loading import load_model, load_model_and_tokenizer
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.recipes.base import Choice
from bamba_quant.recipes.mixtures import mixture_named, mixtures, read_mixture
from bamba_quant.writers import write_plan
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from tests.planning.test_quantized_families import TOKENS, loaded, made, model, reference_logits
from tests.planning.test_quantized_models import assert_near
from tests.support import directories, vllm
from tests.support.command import run
from tests.support.conversion import to_gguf, transformers_logits
from tests.support.families import FAMILIES, KINDS, STACKED, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Every kind of scheme of compressed-tensors' form, experts beside shared ones of the same leaf names, and layers.
EVERY = """
about = "a test"
like = "mxfp4a16"
[roles]
ssm_in = [{ format = "ignore", when = "before_attention" }, { format = "fp8-tensor", layers = [0] }, "fp8-dynamic"]
ssm_out = "w8a16-g32"
attn_output = "ignore"
ffn_up_shexp = "w4a16-asym-g64"
ffn_down_shexp = "nvfp4a16"
"""
EXPECTED = {
    "0.mixer.in_proj": "fp8-tensor",
    "0.mixer.out_proj": "w8a16-g32",
    "1.mixer.experts.5.up_proj": "mxfp4a16",
    "1.mixer.experts.5.down_proj": "mxfp4a16",
    "1.mixer.shared_experts.up_proj": "w4a16-g64",
    "1.mixer.shared_experts.down_proj": "nvfp4a16",
    "2.mixer.q_proj": "mxfp4a16",
    "2.mixer.o_proj": None,
}


def emulated(directory: Path) -> np.ndarray:
    """The reference's logits with activations rounded as the file says, in float32."""
    found = load_model(directory)
    backend = with_activations(TORCH, found, "checkpoint", torch.device("cpu"), torch.float32)
    ready = torch_forward.load(found.config, found.weights, backend=backend)
    with torch.no_grad():
        return torch_forward.forward(ready, torch.tensor([TOKENS])).logits[0].numpy()


def decompressed(directory: Path) -> np.ndarray:
    """transformers' logits in float32: it decompresses FP4 to bfloat16 before the first product."""
    network = loaded(directory, torch.bfloat16)
    assert np.isfinite(transformers_logits(network, TOKENS)).all()
    return transformers_logits(torch.nn.Module.float(network), TOKENS)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("bamba", "plain"),
        ("granitemoehybrid", "six experts"),
        ("falcon_h1", "plain"),
        ("nemotron_h", "plain"),
    ],
)
def test_transformers_loads(name: str, case: str, tmp_path: Path) -> None:
    """It decompresses each group by its own form; with dequantize=True it takes one form for all layers.

    transformers 5.23, integrations/compressed_tensors.py, ``get_dense_scheme``; where that passes, its fault is mended.
    """
    directory, plan = made(name, case, "hybrid-nvfp4", tmp_path)
    assert {row.codec.name for row in plan.matrices} == {"fp8-dynamic", "nvfp4a16"}
    assert_near(decompressed(directory), emulated(directory), 0.02)
    with pytest.raises(RuntimeError, match="conversion"):
        loaded(directory, torch.float32, dequantize=True)
    (note,) = (note for note in plan.notes if "dequantize" in note)
    assert note in (directory / "README.md").read_text()


def test_a_users_mixture(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(EVERY.replace("w4a16-asym-g64", "w4a16-g64"))
    mixture = read_mixture(tmp_path / "mine.toml")
    directory, plan = made("nemotron_h", "groups of experts", mixture, tmp_path)
    found = {row.source.name.removeprefix("backbone.layers."): row.codec.name for row in plan.matrices}
    assert {name: found.get(f"{name}.weight") for name in EXPECTED} == EXPECTED
    assert_near(decompressed(directory), emulated(directory), 0.02)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    assert_near(reference_logits(file), reference_logits(directory), 1e-5)


@pytest.mark.parametrize("scheme", ["nvfp4a4", "mxfp4a4"])
def test_activations_of_four_bits(scheme: str, tmp_path: Path) -> None:
    directory, _ = made("bamba", "plain", scheme, tmp_path, imatrix=PlaceholderImatrix())
    found = decompressed(directory)
    # A digit of float32 decides now and then which of two codes is the nearest.
    assert_near(found, emulated(directory), 0.05)
    exact = reference_logits(directory)
    assert np.linalg.norm(found - exact) > 0.1 * np.linalg.norm(exact)


def test_input_scales_are_those_of_the_text(tmp_path: Path) -> None:
    """compressed-tensors' number for what transformers sees enter each layer on the same chunks."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("The miller looked at the river, and the river went on turning his wheel. " * 60)
    words = ("fp4", embedded_model(), out, "--scheme", "nvfp4a4")
    assert "--calibrate" in run(*words, code=2).stderr
    run(*words, "--calibrate", text, "--calibrate-chunks", "2")
    _, encoder = load_model_and_tokenizer(embedded_model())
    chunks = token_chunks(encoder, read_texts([text]), 512, 2)
    network = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    seen: dict[str, float] = {}
    for key, module in network.named_modules():
        module.register_forward_hook(
            lambda module, args, out, key=key: (
                seen.update({key: max(seen.get(key, 0.0), float(args[0].abs().max()))})
                if isinstance(module, torch.nn.Linear)
                else None
            )
        )
    with torch.no_grad():
        for chunk in chunks:
            network(torch.from_numpy(chunk)[None])
    stored = directories.tensors(out)
    found = {name: value for name, value in stored.items() if name.endswith(".input_global_scale")}
    assert len(found) == sum(name.endswith(".weight_global_scale") for name in stored) > 0
    for name, value in found.items():
        largest = torch.tensor(seen[name.removesuffix(".input_global_scale")])
        torch.testing.assert_close(value, generate_gparam(-largest, largest), rtol=1e-4, atol=0)


def test_experts_share_an_input_scale(tmp_path: Path) -> None:
    source = save(model("jamba", "plain"), tmp_path / "model")
    seen = Imatrix(None, {"blk.1.ffn_up_exps.weight": np.ones(6 * 128, np.float32)}, "", 1, largest={})
    with pytest.raises(PlanError, match="nothing entered"):
        plan_quantization(source, "nvfp4a4", imatrix=seen)
    seen = dataclasses.replace(seen, largest=defaultdict(lambda: 1.0, {"blk.1.ffn_up_exps.weight": 3.0}))
    plan = plan_quantization(source, "nvfp4a4", imatrix=seen)
    rows = {row.name.rpartition(".")[0]: row.constants[".input_global_scale"] for row in plan.matrices}
    scales = [
        scale for name, scale in rows.items() if ".1.feed_forward.experts" in name and "up_proj" in name
    ]
    np.testing.assert_allclose(scales, [[448 * 6 / 3]] * 6)
    unknown = plan_quantization(source, "nvfp4a4", allow_config_only=True)
    with pytest.raises(PlanError, match="does not hold a number"):
        write_plan(unknown, tmp_path / "out")


# Stacks of gate and up cannot have two schemes.
SEPARATE = [
    (name, case)
    for name, case in KINDS
    if "mamba2" in FAMILIES[name].blocks(case) and (name, case) not in STACKED
]


@pytest.mark.parametrize(("name", "case"), SEPARATE)
def test_vllm_would_load(name: str, case: str, tmp_path: Path) -> None:
    family, whole = FAMILIES[name], FAMILIES[name].small.whole_blocks or {}
    (tmp_path / "mine.toml").write_text(EVERY)
    network = family.random(**{**family.small.multiples_of_128, **family.small.cases[case], **whole})
    source = save(network, tmp_path / "model", dtype="bfloat16")
    for mixture in (*mixtures().values(), read_mixture(tmp_path / "mine.toml")):
        plan = plan_quantization(source, mixture)
        shapes = {part.name: part.shape for shard in plan.shards for part in shard.parts}
        config = json.loads(plan.files["config.json"])
        scales = {key: np.ones(shape) for key, shape in shapes.items() if "scale" in key}
        assert vllm.check(config, shapes, scales) == len(plan.matrices)
        groups = config["quantization_config"]["config_groups"]
        assert len(groups) == len({row.codec for row in plan.matrices})
        if len(groups) > 1:
            groups["group_0"], groups["group_1"] = groups["group_1"], groups["group_0"]
            groups["group_0"]["targets"], groups["group_1"]["targets"] = (
                groups["group_1"]["targets"],
                groups["group_0"]["targets"],
            )
            with pytest.raises(vllm.RefusalError, match="wants"):
                vllm.check(config, shapes, scales)


WRONG = [
    ('default = "nvfp4"', "unknown type 'nvfp4'"),
    ('like = "q4_k_m"', "hybrid-nvfp4"),
    ('default = "fp8-dynamic"\nformat = "x"', "unknown keys"),
    ('about = "nothing"', "neither 'default' nor 'like'"),
    ('default = "nvfp4a16"\nroles.ssm_conv1d = "ignore"', "no tensor that can be quantized has this role"),
    (
        'default = "nvfp4a16"\nroles.ssm_in = { format = "ignore", when = "last" }',
        "no condition has this name",
    ),
    ('default = "nvfp4a16"\nroles.attn_q = "fp8-dynamic"', "fuses would have different schemes"),
    ('default = "nvfp4a16"\nroles.attn_q = "ignore"', "fuses would be ignored"),
    ('default = "torchao-int4-g32"\nroles.ssm_in = "fp8-dynamic"', "a form of its own"),
    ('default = "ignore"', "no matrix remains"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said for _, said in WRONG])
def test_mixtures_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(BambaQuantError) as error:
        plan_quantization(embedded_model(), read_mixture(tmp_path / "mine.toml"))
    assert said in str(error.value)


def test_a_fused_matrix_has_one_scheme(tmp_path: Path) -> None:
    source = save(FAMILIES["granitemoehybrid"].random(), tmp_path / "model")
    mixture = dataclasses.replace(mixture_named("fp8"), roles={"ffn_up": (Choice("ignore"),)})
    with pytest.raises(PlanError, match="these roles in one matrix"):
        plan_quantization(source, mixture)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", embedded_model(), out, "--recipe", "hybrid-nvfp4", "--ignore", "ffn_down", "--ignore",
               "ffn_gate", "--ignore", "ffn_up", "--method", "absmax", "--json")  # fmt: skip
    said = json.loads(done.stdout)
    assert (said["scheme"], said["method"]) == ("hybrid-nvfp4", "absmax")
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"]]
    assert "hybrid-fp8" in run("quantize", embedded_model(), out, "--recipe", "hybrid", code=2).stderr
    assert "hybrid-nvfp4" in run("recipes").stdout
    shown = run("recipes", "hybrid-nvfp4").stdout
    (tmp_path / "copy.toml").write_text(shown)
    assert read_mixture(tmp_path / "copy.toml") == mixture_named("hybrid-nvfp4")
