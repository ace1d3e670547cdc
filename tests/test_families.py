"""What holds for Bamba holds for every family: logits, the way back, recipes, inspection, complaints, dry runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.errors import ArchitectureError, CheckpointError, PlanError, TokenizerError
from bamba_quant.families.bamba import BAMBA
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.repair import plan_repair
from bamba_quant.writers import write_plan
from bamba_reference.tensors import tensor_shapes
from tests.support import llama
from tests.support.conversion import random_tokens, to_gguf, transformers_logits
from tests.support.families import CASES, FAMILIES, RICHEST, SPELLED, Spelling, random_case, save


@pytest.mark.parametrize(("name", "case", "spelling"), SPELLED)
def test_llama_cpp_computes_what_transformers_does(
    name: str, case: str, spelling: Spelling, tmp_path: Path
) -> None:
    model = random_case(name, case, seed=len(case))
    file = to_gguf(save(model, tmp_path / "m", spelling=spelling), tmp_path / "m.gguf", vocab=False)
    tokens = random_tokens(model.config.vocab_size)
    reference = transformers_logits(model, tokens)
    difference = np.abs(llama.logits(file, tokens) - reference).max()
    assert difference <= 1e-3 * reference.std(), f"{difference / reference.std():.2e} standard deviations"


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_weights_have_the_references_names(name: str, case: str, kind: str, tmp_path: Path) -> None:
    """Values are compared where the way back is: here, that both kinds of file hold one model."""
    directory = save(random_case(name, case), tmp_path / "m")
    original = load_model(directory)
    found = (
        original if kind == "directory" else load_model(to_gguf(directory, tmp_path / "m.gguf", vocab=False))
    )
    assert {key: value.shape for key, value in found.weights.items()} == tensor_shapes(original.config)
    for key, value in original.weights.items():
        tolerance = 1e-6 if key.endswith("A_log") and kind == "gguf" else 0
        np.testing.assert_allclose(found.weights[key], value, tolerance, tolerance, err_msg=key)
    vocabulary = {"bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}
    for field, value in vars(replace(original.config, **vocabulary)).items():
        expected = value if field == "layers" else pytest.approx(value)
        assert getattr(replace(found.config, **vocabulary), field) == expected, field


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_way_back(name: str, case: str, dtype: Any, tmp_path: Path) -> None:
    """transformers loads what was exported, and every tensor on disk is the one it wrote itself."""
    model = random_case(name, case)
    directory = save(model, tmp_path / "m", dtype=dtype)
    outtype = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    file = to_gguf(directory, tmp_path / "m.gguf", outtype, vocab=False)
    plan = plan_export(file, vocab=False)
    write_plan(plan, tmp_path / "back")
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        if key.endswith("A_log") and dtype == "float32":
            torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(after[key], tensor), key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    tokens = random_tokens(model.config.vocab_size, 50)
    stored = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = transformers_logits(stored, tokens)
    assert np.abs(transformers_logits(loaded, tokens) - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(("name", "case"), RICHEST)
def test_shards_sections_and_dtypes(name: str, case: str, tmp_path: Path) -> None:
    """Small shards keep the sections of a stacked tensor together; f16 is kept; a GGUF is the same from either."""
    whole = save(random_case(name, case), tmp_path / "whole", dtype="float16")
    parted = save(random_case(name, case), tmp_path / "parted", dtype="float16", shards=3)
    assert len(list(parted.glob("*.safetensors"))) >= 3
    files = [to_gguf(path, tmp_path / f"{path.name}.gguf", "auto", vocab=False) for path in (whole, parted)]
    tensors = [open_checkpoint(file).tensors for file in files]
    assert tensors[0].keys() == tensors[1].keys()
    write_plan(plan_export(files[0], vocab=False, max_shard_bytes=30_000), tmp_path / "back")
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 3
    back = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    for key, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", FAMILIES)
def test_inspection_agrees_on_both_kinds(name: str, tmp_path: Path) -> None:
    directory = save(random_case(name), tmp_path / "m")
    file = to_gguf(directory, tmp_path / "m.gguf", "q8_0", vocab=False)
    source, written = inspect_path(directory), inspect_path(file)
    assert source.layers == written.layers == load_model(directory).config.layer_types
    assert source.checkpoint.elements == written.checkpoint.elements
    assert not source.remarks and not written.remarks
    json.dumps(dict(written.metadata))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != BAMBA.name])
def test_nothing_but_a_bamba_is_repaired(name: str, tmp_path: Path) -> None:
    file = to_gguf(save(random_case(name), tmp_path / "m"), tmp_path / "m.gguf", vocab=False)
    with pytest.raises(CheckpointError, match="does not need a repair"):
        plan_repair(file)


@pytest.mark.parametrize(("name", "case"), RICHEST)
def test_a_dry_run_says_what_is_written(name: str, case: str, tmp_path: Path) -> None:
    directory = save(random_case(name, case), tmp_path / "m", dtype="bfloat16")
    planned = plan_conversion(directory, outtype="q4_k_m", outfile=tmp_path / "m.gguf", vocab=False)
    assert list(tmp_path.glob("*.gguf")) == []
    file = to_gguf(directory, tmp_path / "m.gguf", "q4_k_m", vocab=False)
    found = open_checkpoint(file).tensors
    assert [(row.name, row.format.name, row.shape) for row in planned.rows] == [
        (tensor.name, tensor.format.name, tensor.shape) for tensor in found.values()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_that_do_not_fit(name: str, tmp_path: Path) -> None:
    directory = save(random_case(name), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")

    def broken(change: dict[str, Any], without: str | None = None) -> Path:
        kept = {key: tensor for key, tensor in tensors.items() if key != without}
        save_file(kept | change, directory / "model.safetensors")
        return directory

    one = next(key for key in tensors if key.endswith("out_proj.weight"))
    with pytest.raises(PlanError, match="does not know"):
        plan_conversion(broken({"model.odd.weight": torch.zeros(3)}), vocab=False)
    with pytest.raises(PlanError, match="lacks tensors"):
        plan_conversion(broken({}, without=one), vocab=False)
    with pytest.raises(PlanError, match="another shape"):
        plan_conversion(broken({one: torch.zeros(4, 4)}), vocab=False)
    nan = tensors[one].clone()
    nan[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match="not a finite number"):
        to_gguf(broken({one: nan}), tmp_path / "nan.gguf", vocab=False)
    assert not (tmp_path / "nan.gguf").exists()
    with pytest.raises(TokenizerError, match="no tokenizer"):
        plan_conversion(broken({}))
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    with pytest.raises(ArchitectureError, match=r"GraniteMoeHybridForCausalLM, .*Mamba"):
        plan_conversion(directory, outfile=tmp_path / "no.gguf", vocab=False)
    assert not (tmp_path / "no.gguf").exists()


REFUSED = [(name, *refused) for name, family in FAMILIES.items() for refused in family.small.refused_by_gguf]


@pytest.mark.parametrize(("name", "overrides", "key"), REFUSED)
def test_what_llama_cpp_has_no_place_for(
    name: str, overrides: dict[str, Any], key: str, tmp_path: Path
) -> None:
    """Refused before anything is written; the reference still takes every tensor of the model."""
    directory = save(FAMILIES[name].random(**overrides), tmp_path / "m", spelling=5)
    with pytest.raises(ArchitectureError, match=f"cannot represent this model's {key}"):
        plan_conversion(directory, outfile=tmp_path / "m.gguf", vocab=False)
    loaded = load_model(directory)
    assert loaded.weights.keys() == tensor_shapes(loaded.config).keys()
