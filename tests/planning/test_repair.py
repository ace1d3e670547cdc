"""A repaired file is the file a right conversion makes, tensor for tensor, in every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import LlamaFileType

from bamba_quant.checkpoint.gguf_values import GgufValue, boolean, uint32
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError
from bamba_quant.families import Family, family_of
from bamba_quant.families.transforms import interleave_rotary
from bamba_quant.metadata.general import TOOL_VERSION_KEY
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.repair import plan_repair
from bamba_quant.writers import write_plan
from tests.support import llama
from tests.support.conversion import assert_same_tensors, faulty
from tests.support.models import random_bamba, save_checkpoint

HEAD_128 = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_d_head": 64}


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter (conversion/llama.py, ``permute``): rows of each half of a head interleaved."""
    head_dim = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = rows[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = rows[head * head_dim + head_dim // 2 + i]
    return out


def test_the_fault_is_the_one_llama_cpp_has() -> None:
    rows = np.arange(4 * 24 * 3).reshape(4 * 24, 3)
    np.testing.assert_array_equal(interleave_rotary(24, 24).apply(rows, 0), llama_cpp_order(rows, 4))


def right(model: Path, target: Path, outtype: str = "f32") -> Path:
    planned = plan_conversion(model, outtype=outtype, outfile=target, vocab=False)
    return write_plan(planned, planned.outfile)[0]


def repaired(file: Path, target: Path) -> Path:
    return write_plan(plan_repair(file), target)[0]


def differing(a: Path, b: Path) -> set[str]:
    with pytest.raises(AssertionError):
        assert_same_tensors(a, b)
    return {"q and k"}


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("overrides", [{}, HEAD_128, {"attention_bias": True, "attn_layer_indices": [0, 3]}])
def test_repaired_equals_converted(outtype: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(**overrides), tmp_path / "m")
    wrong = faulty(directory, tmp_path / "wrong.gguf", outtype)
    good = right(directory, tmp_path / "right.gguf", outtype)
    assert differing(wrong, good)
    assert_same_tensors(repaired(wrong, tmp_path / "repaired.gguf"), good)


@pytest.mark.parametrize(
    "file_type", [LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_0, LlamaFileType.MOSTLY_Q3_K_S]
)
def test_repaired_after_llama_quantize_equals_quantized_after_conversion(
    file_type: LlamaFileType, tmp_path: Path
) -> None:
    wrong = faulty(embedded_model(), tmp_path / "wrong.gguf", "bf16")
    good = right(embedded_model(), tmp_path / "right.gguf", "bf16")
    llama.quantize(wrong, tmp_path / "wrong-q.gguf", file_type)
    llama.quantize(good, tmp_path / "right-q.gguf", file_type)
    assert_same_tensors(
        repaired(tmp_path / "wrong-q.gguf", tmp_path / "repaired-q.gguf"), tmp_path / "right-q.gguf"
    )


def test_split_file_keeps_its_shards(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    first = faulty(directory, tmp_path / "wrong.gguf", split_max_bytes=60_000)
    plan = plan_repair(first)
    files = write_plan(plan, tmp_path / "repaired.gguf")
    assert len(files) == len(plan.shards) > 2
    assert_same_tensors(files[0], right(directory, tmp_path / "right.gguf"))


def test_repaired_file_is_not_repaired_again(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    wrong = faulty(directory, tmp_path / "wrong.gguf")
    assert any("repair" in remark for remark in inspect_path(wrong).remarks)
    once = repaired(wrong, tmp_path / "repaired.gguf")
    assert not inspect_path(once).remarks
    with pytest.raises(CheckpointError, match="right order"):
        plan_repair(once)


def test_other_files_are_refused(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(CheckpointError, match="right order"):
        plan_repair(right(directory, tmp_path / "right.gguf"))
    whole = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    directory = save_checkpoint(random_bamba(**whole), tmp_path / "whole", spelling=5)
    with pytest.raises(CheckpointError, match="whole heads"):
        plan_repair(faulty(directory, tmp_path / "whole.gguf"))
    with pytest.raises(CheckpointError, match="not a GGUF"):
        plan_repair(directory / "config.json")


def test_files_with_other_names_are_left_alone(tmp_path: Path) -> None:
    wrong = faulty(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "wrong.gguf")
    raw = wrong.read_bytes()
    wrong.write_bytes(raw.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(
        CheckpointError, match=r"no query or key matrix[\s\S]*found: no blk\.1\.attn_q\.weight"
    ):
        plan_repair(wrong)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rope.scaling.finetuned": boolean(False)}, "switched off"),
        ({"rope.dimension_count": uint32(0)}, "rotary width is 0"),
        ({"rope.dimension_count": uint32(7)}, "rotary width is 7"),
        ({"attention.head_count_kv": uint32(2)}, "its attention layers"),
        ({"attention.key_length": uint32(24)}, "do not divide into heads"),
    ],
)
def test_key_values_that_do_not_fit(change: dict[str, GgufValue], complaint: str, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    planned = plan_conversion(directory, vocab=False, outfile=tmp_path / "x.gguf")
    metadata = {key: value for key, value in planned.metadata.items() if key != TOOL_VERSION_KEY}
    metadata |= {f"granitehybrid.{key}": value for key, value in change.items()}
    write_plan(with_key_values(planned, metadata), planned.outfile)
    with pytest.raises(CheckpointError, match=complaint):
        plan_repair(planned.outfile)


def test_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    bamba = family_of({"model_type": "bamba"})
    other: Family = replace(bamba, gguf_architectures=("llama",))
    monkeypatch.setattr("bamba_quant.planning.model.family_of", lambda hf: other)
    with pytest.raises(CheckpointError, match="'llama', not 'granitehybrid'"):
        plan_repair(faulty(directory, tmp_path / "other.gguf"))
