"""An export's directory appears whole or not at all, and what cannot be exported is named."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.embedded import embedded_model
from bamba_quant.errors import BambaQuantError, CheckpointError, OutputError, PlanError
from bamba_quant.planning.export import plan_export
from bamba_quant.planning.plan import PlanRow
from bamba_quant.writers import write_plan
from tests.support.conversion import faulty, to_gguf
from tests.support.exports import assert_same_checkpoint, exported
from tests.support.models import random_bamba, save_checkpoint


def test_a_decay_that_grows(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16")
    row = next(row for row in plan_export(file).rows if row.role == "ssm_a")
    with file.open("r+b") as stream:
        stream.seek(row.source.offset)
        stream.write(np.float32(0.5).tobytes())
    with pytest.raises(CheckpointError, match="ssm_a"):
        exported(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_misplaced_rows_and_other_inputs_are_refused(tmp_path: Path) -> None:
    original = save_checkpoint(random_bamba(), tmp_path / "m")
    with pytest.raises(PlanError, match="bamba-quant repair"):
        plan_export(faulty(original, tmp_path / "wrong.gguf"))
    with pytest.raises(PlanError, match="reads a GGUF"):
        plan_export(original)
    with pytest.raises(PlanError, match="float8"):
        plan_export(to_gguf(original, tmp_path / "m.gguf", vocab=False), dtype="float8")
    with pytest.raises(BambaQuantError, match="tensors do not match"):
        plan_export(to_gguf(embedded_model(), tmp_path / "v.gguf", vocab_only=True))


def test_output_directories(tmp_path: Path) -> None:
    plan = plan_export(to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16"))
    (tmp_path / "empty").mkdir()
    write_plan(plan, tmp_path / "empty")
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    with pytest.raises(OutputError, match="--overwrite"):
        write_plan(plan, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    write_plan(plan, tmp_path / "empty", overwrite=True)
    assert len((tmp_path / "empty" / "config.json").read_text()) > 2
    (tmp_path / "empty" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        write_plan(plan, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="create it first"):
        write_plan(plan, tmp_path / "no" / "where")
    with pytest.raises(OutputError, match="replace the input"):
        write_plan(plan, tmp_path / "m.gguf", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"):
        write_plan(plan, tmp_path / "file", overwrite=True)
    (tmp_path / "file").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    write_plan(plan, tmp_path / "link")
    assert sorted(path.name for path in (tmp_path / "linked").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "linked", "m.gguf"]


def test_an_interrupted_export_is_resumed(tmp_path: Path) -> None:
    plan = plan_export(to_gguf(embedded_model(), tmp_path / "m.gguf", "bf16"))
    threads = threading.active_count()

    def interrupt(n_bytes: int) -> None:
        assert (tmp_path / "out.partial" / "model.safetensors").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(plan, tmp_path / "out", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out.partial"]
    with pytest.raises(OutputError, match="--resume"):
        write_plan(plan, tmp_path / "out")
    told: list[int] = []
    write_plan(plan, tmp_path / "out", resume=True, progress=told.append)
    assert sum(told) == plan.work_bytes
    assert_same_checkpoint(tmp_path / "out", embedded_model())
    with pytest.raises(KeyboardInterrupt):
        write_plan(plan, tmp_path / "out", overwrite=True, progress=interrupt)
    assert_same_checkpoint(tmp_path / "out", embedded_model())
    assert threading.active_count() == threads


@pytest.mark.filterwarnings("ignore:invalid value")
def test_damaged_blocks_are_named(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "q.gguf", "q8_0")
    plan = plan_export(file)
    row: PlanRow = next(row for row in plan.rows if row.source.format.name == "q8_0")
    with file.open("r+b") as stream:
        stream.seek(row.source.offset)
        stream.write(b"\x00\x7c")  # a scale of infinity
    with pytest.raises(CheckpointError, match=row.source.name):
        write_plan(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"]


def test_values_too_large_for_f16(tmp_path: Path) -> None:
    model = random_bamba()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    file = to_gguf(save_checkpoint(model, tmp_path / "m"), tmp_path / "m.gguf", vocab=False)
    with pytest.raises(BambaQuantError, match=r"output\.weight"):
        exported(file, tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out").exists()
