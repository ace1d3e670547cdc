"""Every recipe makes, in one pass from the checkpoint, the file that llama.cpp makes of a bf16 GGUF: byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bamba_quant.checkpoint.imatrix import MAY_BE_MISSING
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.model import open_model
from bamba_quant.recipes import Recipe, TypeOverrides, recipe_named, recipes
from tests.support import llama
from tests.support.conversion import assert_same_tensors, to_gguf
from tests.support.families import FAMILIES, save
from tests.support.models import random_bamba, save_checkpoint
from tests.support.shared import shared

QUANTIZED = [
    recipe for recipe in recipes() if recipe.name not in ("f32", "f16", "bf16") and not recipe.candidates
]
# Sixteen layers, so that eighths and sixteenths are layers; the first is attention with eight queries to a key, which
# is when llama-quantize's rules for grouped queries apply.
DEEP: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8,
    "num_key_value_heads": 1, "attn_layer_indices": [0, 3, 7, 9, 11, 13, 15], "mamba_d_head": 64,
    "mamba_n_heads": 8, "vocab_size": 256,
}  # fmt: skip
ODD: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 272, "mamba_d_head": 24}
MODELS: dict[str, dict[str, Any]] = {
    "deep": DEEP,
    "tied": DEEP | {"tie_word_embeddings": True, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "rows of 96 and 272": ODD,
}
# Of the other families, what llama-quantize's rules look at: key-value heads, experts, ties, lengths of rows.
_GRANITE: dict[str, Any] = {
    "hidden_size": 256, "shared_intermediate_size": 256, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 1, "mamba_d_head": 64, "vocab_size": 64,
    "layer_types": ["mamba", "attention"],
}  # fmt: skip
_ALONE: dict[str, Any] = {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}
_EIGHT: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
# An attention output of half the model's width, and a mixer of three times it.
_FALCON_H1: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "mamba_d_ssm": 768, "mamba_n_heads": 12, "mamba_d_head": 64,
    "vocab_size": 64,
}  # fmt: skip
# Rows of experts that are a multiple of 32 and not of 256, as the 1856 and 3712 of Nemotron 3 Nano.
_NEMOTRON: dict[str, Any] = {
    "hidden_size": 256, "vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32,
    "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "layers_block_type": ["linear_attention", "moe", "full_attention"], "moe_intermediate_size": 928,
    "moe_shared_expert_intermediate_size": 480,
}  # fmt: skip
_MIXERS: dict[str, Any] = {"hidden_size": 256, "vocab_size": 64, "num_hidden_layers": 1}
_JAMBA: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 1, "num_experts": 8, "attn_layer_period": 2, "expert_layer_offset": 0,
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite, eight experts": ("granitemoehybrid", _GRANITE | _EIGHT),
    "granite, attention alone, tied": ("granitemoehybrid", _GRANITE | _ALONE | {"tie_word_embeddings": True}),
    "nemotron, experts of 928": ("nemotron_h", _NEMOTRON),
    "mamba2": ("mamba2", _MIXERS | {"num_heads": 8, "head_dim": 64, "n_groups": 2}),
    "mamba, a rank of 48": ("mamba", _MIXERS | {"time_step_rank": 48}),
    "jamba, eight experts": ("jamba", _JAMBA),
    "falcon_h1": ("falcon_h1", _FALCON_H1),
    "falcon_mamba": ("falcon_mamba", _MIXERS | {"tie_word_embeddings": False, "time_step_rank": 256}),
}
# Where rules go by the layer: sixteen, and where experts and their neighbour share a count. Without importance, which
# the others have.
_DEEP_GRANITE: dict[str, Any] = {
    **_GRANITE, "num_hidden_layers": 16, "layer_types": ["attention", *["mamba", "attention", "attention"] * 5],
    "num_experts_per_tok": 1, "intermediate_size": 256,
}  # fmt: skip
_DEEP_NEMOTRON: dict[str, Any] = {
    **_NEMOTRON, "intermediate_size": 256, "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256,
}  # fmt: skip
DEEP_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite, dense": ("granitemoehybrid", _DEEP_GRANITE),
    "granite, one expert": ("granitemoehybrid", _DEEP_GRANITE | {"num_local_experts": 1}),
    "granite, two experts": ("granitemoehybrid", _DEEP_GRANITE | {"num_local_experts": 2}),
    "jamba, two experts in every second layer": (
        "jamba",
        _JAMBA
        | {"num_hidden_layers": 16, "num_experts": 2, "attn_layer_offset": 0, "intermediate_size": 256},
    ),
    "nemotron, latent experts": (
        "nemotron_h",
        _DEEP_NEMOTRON
        | {
            "layers_block_type": ["full_attention", *["moe", "linear_attention", "full_attention"] * 5],
            "moe_latent_size": 64,
        },
    ),
    "nemotron, networks": (
        "nemotron_h",
        _DEEP_NEMOTRON
        | {
            "layers_block_type": ["mlp", *["full_attention", "linear_attention", "mlp"] * 5],
        },
    ),
}
BY_LAYER = ("q2_k", "q3_k_m", "q4_k_m", "q5_0")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each model as a bf16 directory and as the bf16 GGUF that llama.cpp quantizes."""
    base = tmp_path_factory.mktemp("models")
    made = {}
    for name, overrides in MODELS.items():
        directory = save_checkpoint(random_bamba(**overrides), base / name, dtype="bfloat16")
        made[name] = (directory, to_gguf(directory, base / f"{name}.gguf", "bf16", vocab=False))
    for name, (family, overrides) in (OTHERS | DEEP_OTHERS).items():
        directory = save(FAMILIES[family].random(**overrides), base / name, dtype="bfloat16")
        made[name] = (directory, to_gguf(directory, base / f"{name}.gguf", "bf16", vocab=False))
    return made


def random_imatrix(model: Path, file: Path) -> dict[str, np.ndarray]:
    """Importance for every matrix that llama-imatrix measures, some of it zero, written to ``file`` as it does."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "x")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    importance = {}
    for _, rule in open_model(model).pairs:
        if rule.gguf is None or rule.role == "token_embd" or len(rule.gguf_shape) < 2:
            continue
        # Of a stack of matrices each has its own, over as many tokens as were sent to that expert.
        count = rule.gguf_shape[0] if len(rule.gguf_shape) == 3 else 1
        sums = (100 * rng.chisquare(1, (count, rule.gguf_shape[-1]))).astype(np.float32)
        sums[rng.random(sums.shape) < 0.05] = 0
        tokens = np.full((count, 1), 3584, np.float32) - 100 * np.arange(count, dtype=np.float32)[:, None]
        writer.add_tensor(f"{rule.gguf}.in_sum2", sums)
        writer.add_tensor(f"{rule.gguf}.counts", tokens)
        importance[str(rule.gguf)] = (sums / tokens).reshape(-1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return importance


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (model, recipe)
        for model in (*MODELS, *OTHERS)
        for recipe in QUANTIZED
        # Jamba's roles are Granite's and Mamba's: a few types show that they are counted alike.
        if "jamba" not in model or recipe.name in BY_LAYER
    ]
    + [(model, recipe_named(name)) for model in DEEP_OTHERS for name in BY_LAYER],
    ids=lambda value: value.name if isinstance(value, Recipe) else value,
)
def test_random_models(
    recipe: Recipe, model: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, bf16 = checkpoints[model]
    weights = random_imatrix(directory, tmp_path / "imatrix.gguf")
    if recipe.needs_importance and model != "rows of 96 and 272":
        with pytest.raises(PlanError, match="importance matrix"):
            plan_conversion(directory, outtype=recipe.name, vocab=False)
    else:
        llama.quantize(bf16, tmp_path / "theirs.gguf", recipe.file_type)
        ours = to_gguf(directory, tmp_path / "ours.gguf", recipe.name, vocab=False)
        assert_same_tensors(ours, tmp_path / "theirs.gguf")
    if model in DEEP_OTHERS:
        return
    llama.quantize(bf16, tmp_path / "weighted.gguf", recipe.file_type, imatrix=weights)
    ours = to_gguf(
        directory, tmp_path / "ours-w.gguf", recipe.name, vocab=False, imatrix=tmp_path / "imatrix.gguf"
    )
    assert_same_tensors(ours, tmp_path / "weighted.gguf")


def test_bamba_43m(tmp_path: Path) -> None:
    """Two recipes of a trained model; benchmarks/quantize.py compares all of them, on models of any size."""
    directory = shared("models/bamba-43m")
    weights = random_imatrix(directory, tmp_path / "imatrix.gguf")
    bf16 = to_gguf(directory, tmp_path / "bf16.gguf", "bf16")
    for name, imatrix in (("q4_k_m", None), ("q2_k", tmp_path / "imatrix.gguf")):
        theirs, ours = tmp_path / f"theirs-{name}.gguf", tmp_path / f"ours-{name}.gguf"
        llama.quantize(bf16, theirs, recipe_named(name).file_type, imatrix=weights if imatrix else None)
        assert_same_tensors(to_gguf(directory, ours, name, imatrix=imatrix), theirs)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (TypeOverrides(pure=True), {"pure": True}),
        (TypeOverrides(output_tensor_type="q8_0"), {"output_tensor_type": 8}),
        (TypeOverrides(token_embedding_type="q4_0"), {"token_embedding_type": 2}),
        (TypeOverrides(leave_output_tensor=True), {"quantize_output_tensor": False}),
        (TypeOverrides(tensor_types=(("ssm_out", "q6_k"), ("attn_.*weight", "q8_0"))),
         {"tensor_types": [("ssm_out", 14), ("attn_.*weight", 8)]}),
        (TypeOverrides(tensor_types=((r"blk\.[0-3]\.ffn_down", "q5_0"), ("mamba.out_proj", "q6_k"))),
         {"tensor_types": [(r"blk\.[0-3]\.ffn_down", 6), ("ssm_out", 14)]}),
    ],
    ids=["pure", "output", "embedding", "leave output", "patterns", "patterns that shift counters"],
)  # fmt: skip
@pytest.mark.parametrize("model", ["deep", "tied"])
def test_wishes(
    overrides: TypeOverrides,
    options: dict[str, Any],
    model: str,
    checkpoints: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    directory, bf16 = checkpoints[model]
    for name in ("q4_k_m", "q3_k_m"):
        theirs, ours = tmp_path / f"theirs-{name}.gguf", tmp_path / f"ours-{name}.gguf"
        llama.quantize(bf16, theirs, recipe_named(name).file_type, **options)
        assert_same_tensors(to_gguf(directory, ours, name, vocab=False, overrides=overrides), theirs)


def test_numpy_and_compiled_write_the_same_file(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from bamba_quant.writers import write_plan

    planned = plan_conversion(
        checkpoints["deep"][0], outtype="q4_k_m", vocab=False, outfile=tmp_path / "a.gguf"
    )
    write_plan(planned, planned.outfile, threads=3)
    write_plan(planned, tmp_path / "b.gguf", compiled=False)
    assert planned.outfile.read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_from_gguf_input(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    directory, bf16 = checkpoints["deep"]
    from_file = to_gguf(bf16, tmp_path / "file.gguf", "q4_k_m")
    assert_same_tensors(from_file, to_gguf(directory, tmp_path / "directory.gguf", "q4_k_m", vocab=False))
    with pytest.raises(PlanError, match="--allow-requantize"):
        to_gguf(from_file, tmp_path / "again.gguf", "q2_k")
    llama.quantize(from_file, tmp_path / "theirs.gguf", recipe_named("q2_k").file_type, allow_requantize=True)
    ours = to_gguf(from_file, tmp_path / "again.gguf", "q2_k", allow_requantize=True)
    assert_same_tensors(ours, tmp_path / "theirs.gguf")
    assert to_gguf(from_file, tmp_path / "same.gguf", "q4_k_m")


def test_embedded_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    bf16 = to_gguf(embedded_model(), tmp_path / "m-BF16.gguf", "bf16")
    planned = plan_conversion(bf16, outtype="q4_k_m")
    assert planned.outfile.name == "m-Q4_K_M.gguf"
    direct = plan_conversion(embedded_model(), outtype="q4_k_m")
    for key, value in direct.metadata.items():
        assert planned.metadata[key].value == pytest.approx(value.value), key


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (TypeOverrides(tensor_types=(("nonsense", "q8_0"),)), "nonsense"),
        (TypeOverrides(tensor_types=(("(", "q8_0"),)), "regular expression"),
        (TypeOverrides(tensor_types=(("ffn", "q9"),)), "q9"),
        (TypeOverrides(output_tensor_type="iq2_s"), "iq2_s"),
    ],
)
def test_wishes_that_cannot_be(overrides: TypeOverrides, complaint: str) -> None:
    with pytest.raises(BambaQuantError, match=complaint):
        plan_conversion(embedded_model(), outtype="q4_k_m", overrides=overrides)


def test_every_recipe_is_documented_and_every_alias_known() -> None:
    assert all(recipe.about for recipe in recipes())
    assert recipe_named("Q4_K").name == "q4_k_m"
    assert recipe_named("Q3_K").name == "q3_k_m"
    assert {"token_embd", "output"} == MAY_BE_MISSING
