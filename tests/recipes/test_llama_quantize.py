"""Every recipe makes, in one pass from the checkpoint, the file that llama.cpp makes of a bf16 GGUF: byte for byte."""

from __future__ import annotations

from itertools import product
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
from tests.support.families import FAMILIES, sampled, save
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
OTHERS = {
    name: (family, keys)
    for family in FAMILIES
    for name, keys in FAMILIES[family].small.llama_quantize.items()
}
# Where rules go by the layer. Without importance, which the others have.
DEEP_OTHERS = {
    name: (family, keys)
    for family in FAMILIES
    for name, keys in FAMILIES[family].small.llama_quantize_by_layer.items()
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
        *product(MODELS, QUANTIZED),
        # A role is counted alike in every family: each has a third of the types.
        *sampled([(model,) for model in OTHERS], QUANTIZED, len(QUANTIZED) // 3),
        *product(DEEP_OTHERS, [recipe_named(name) for name in BY_LAYER]),
    ],
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
