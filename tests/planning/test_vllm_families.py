"""FP8, integer and FP4 directories of every family by vLLM's rules: it would load them, or the plan says why not."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bamba_quant.planning.quantize import plan_quantization
from tests.planning.test_quantized_families import COMPRESSED
from tests.support import vllm
from tests.support.families import FAMILIES, KINDS, STACKED, sampled, save

KEEP = {"all": [], "output": ["ssm_out"], "layer 0": ["*.layers.0.*"]}


@pytest.mark.parametrize(
    ("name", "case", "scheme", "keep"),
    sampled(
        [
            (*one, scheme)
            for one, scheme in product(KINDS, [*COMPRESSED, "fp8-block-inv"])
            if FAMILIES[one[0]].small.whole_blocks
        ],
        list(KEEP),
        1,
    ),
)
def test_vllm_would_load(name: str, case: str, scheme: str, keep: str, tmp_path: Path) -> None:
    family, small = FAMILIES[name], FAMILIES[name].small
    assert small.whole_blocks is not None
    network = family.random(**{**small.multiples_of_128, **small.cases[case], **small.whole_blocks})
    source = save(network, tmp_path / "model", dtype="bfloat16")
    kept = KEEP[keep]
    if keep == "output" and "mamba2" not in family.blocks(case):
        kept = ["attn_output"]
    plan = plan_quantization(source, scheme, keep=kept)
    shapes = {part.name: part.shape for shard in plan.shards for part in shard.parts}
    config = json.loads(plan.files["config.json"])
    scales = {key: np.ones(shape) for key, shape in shapes.items() if "scale" in key}
    assert vllm.check(config, shapes, scales) == len(plan.matrices)
    assert not any("vLLM" in note for note in plan.notes)
    if keep != "all" or (name, case) in STACKED:
        key = "modules_to_not_convert" if scheme == "fp8-block-inv" else "ignore"
        config["quantization_config"][key] = ["lm_head"]
        with pytest.raises(vllm.RefusalError, match=r"experts|out_proj|o_proj|layers\.0\."):
            vllm.check(config, shapes, scales)


CUT = [(name, sizes, role) for name, family in FAMILIES.items() for sizes, role in family.small.cut_blocks]


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


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].family.loaders.vllm is None])
def test_vllm_does_not_quantize_mamba(name: str, tmp_path: Path) -> None:
    network = FAMILIES[name].random(**FAMILIES[name].small.multiples_of_128)
    plan = plan_quantization(save(network, tmp_path / "model"), "fp8-dynamic")
    with pytest.raises(vllm.RefusalError, match="MambaMixer"):
        vllm.check(json.loads(plan.files["config.json"]), {}, {})
    assert any("vLLM has no quantized layers" in note for note in plan.notes)
