"""A plan follows from headers alone, says what it will do, and refuses what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.gguf_header import DEFAULT_ALIGNMENT
from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.planning.convert import plan_conversion
from tests.support.models import random_bamba, save_checkpoint


def model(path: Path, **overrides: Any) -> Path:
    return save_checkpoint(random_bamba(**overrides), path)


def change_weights(path: Path, change: Any) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")


def change_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))


def test_rows_lie_one_behind_another(tmp_path: Path) -> None:
    plan = plan_conversion(model(tmp_path), outtype="q8_0", vocab=False)
    end = 0
    for row in plan.rows:
        (part,) = row.parts
        assert part.offset == end
        assert part.offset % DEFAULT_ALIGNMENT == 0
        end = part.offset + -(-row.n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    assert plan.n_bytes == end


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "bf16"), ("bfloat16", "bf16"), ("float16", "f16")]
)
def test_auto_keeps_the_sixteen_bit_type(dtype: Any, expected: str, tmp_path: Path) -> None:
    save_checkpoint(random_bamba(), tmp_path, dtype=dtype)
    assert plan_conversion(tmp_path, vocab=False).recipe == expected


def test_types_by_role(tmp_path: Path) -> None:
    plan = plan_conversion(model(tmp_path, attention_bias=True), outtype="q8_0", vocab=False)
    types = {row.role: row.format.name for row in plan.rows}
    assert {role for role, name in types.items() if name == "f32"} == {
        "norm",
        "bias",
        "ssm_conv1d",
        "ssm_dt",
        "ssm_a",
        "ssm_d",
    }
    assert {name for role, name in types.items() if name != "f32"} == {"q8_0"}


def test_rows_that_blocks_do_not_fill_are_noted(tmp_path: Path) -> None:
    plan = plan_conversion(model(tmp_path, intermediate_size=80), outtype="q8_0", vocab=False)
    noted = {row.name: row.format.name for row in plan.rows if row.note}
    assert noted == {f"blk.{i}.ffn_down.weight": "f16" for i in range(4)}


def test_shards_by_size(tmp_path: Path) -> None:
    conversion = plan_conversion(
        model(tmp_path), outtype="f32", vocab=False, split_max_bytes=100_000, outfile=tmp_path / "m.gguf"
    )
    plan = conversion
    assert len(plan.shards) > 2
    for shard in plan.shards:
        assert 0 < shard.n_bytes - len(shard.header) <= 100_000
    files = [file.name for file in plan.paths(plan.outfile)]
    assert files[0] == f"m-00001-of-{len(plan.shards):05d}.gguf"
    assert sum(len(shard.parts) for shard in plan.shards) == len(plan.rows)


def test_default_names(tmp_path: Path) -> None:
    directory = model(tmp_path / "Bamba-9B-v2")
    assert plan_conversion(directory, vocab=False).outfile.parent == directory
    assert plan_conversion(directory, vocab=False).outfile.name == "Bamba-9b-v2-BF16.gguf"
    named = plan_conversion(directory, vocab=False, outtype="q8_0", outfile=tmp_path / "x-{ftype}.gguf")
    assert named.outfile == tmp_path / "x-q8_0.gguf"
    assert plan_conversion(directory, vocab=False, outfile=tmp_path).outfile.parent == tmp_path


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda state: state.update({"model.layers.0.extra.weight": torch.zeros(2)}),
            "model.layers.0.extra.weight",
        ),
        (lambda state: state.pop("model.layers.2.mamba.D"), "model.layers.2.mamba.D missing"),
        (
            lambda state: state.update({"lm_head.weight": torch.zeros(159, 64)}),
            r"\(159, 64\)[\s\S]*\(160, 64\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Any, complaint: str, tmp_path: Path) -> None:
    change_weights(model(tmp_path), change)
    with pytest.raises(PlanError, match=complaint) as error:
        plan_conversion(tmp_path, vocab=False)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"new_mixing_factor": 0.5}, "new_mixing_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        (
            {"attn_rotary_emb": 4, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "different rotary widths",
        ),
        ({"sliding_window": 512}, "sliding_window"),
        ({"mamba_d_head": 32}, "mamba_expand × hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_configurations_that_cannot_be_converted(
    keys: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    change_config(model(tmp_path), **keys)
    with pytest.raises(BambaQuantError, match=complaint):
        plan_conversion(tmp_path, vocab=False)


def test_a_key_the_user_vouches_for(tmp_path: Path) -> None:
    change_config(model(tmp_path), new_mixing_factor=0.5)
    assert plan_conversion(tmp_path, vocab=False, reading=ReadOptions(("new_mixing_factor",))).rows


def test_metadata_from_card_and_overrides(tmp_path: Path) -> None:
    directory = model(tmp_path / "model")
    (directory / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x, y]\n---\n# Card\n")
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"general.author": "Somebody", "general.url": "https://example.org"}))
    plan = plan_conversion(directory, vocab=False, model_name="My Name", metadata=overrides)
    found = {key: value.value for key, value in plan.metadata.items()}
    assert found["general.name"] == "My Name"
    assert found["general.license"] == "mit"
    assert found["general.tags"] == ["x", "y"]
    assert found["general.author"] == "Somebody"
    assert found["granitehybrid.rope.dimension_count"] == 8
    assert found["granitehybrid.attention.head_count_kv"] == [0, 2, 0, 0]
    assert "bamba_quant.version" in found
    overrides.write_text(json.dumps({"general.autor": "x"}))
    with pytest.raises(PlanError, match=r"general\.autor"):
        plan_conversion(directory, vocab=False, metadata=overrides)
    (directory / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(PlanError, match="YAML"):
        plan_conversion(directory, vocab=False)


def test_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="q9_9"):
        plan_conversion(model(tmp_path), outtype="q9_9", vocab=False)
