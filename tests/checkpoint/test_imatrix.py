"""Importance matrices in both forms are read as llama-quantize reads them; what does not fit is named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from bamba_quant.checkpoint.imatrix import read_imatrix
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import CheckpointError, PlanError
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.quantize import plan_quantization
from tests.recipes.test_llama_quantize import random_imatrix
from tests.support.conversion import to_gguf


def write_dat(file: Path, entries: dict[str, np.ndarray], calls: int = 4, tail: bytes | None = None) -> Path:
    """The older form: sums are means times calls."""
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        text = name.encode()
        raw += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, values.size)
        raw += (values * np.float32(calls)).astype("<f4").tobytes()
    dataset = b"some text"
    raw += struct.pack("<ii", 7, len(dataset)) + dataset if tail is None else tail
    file.write_bytes(raw)
    return file


def test_both_forms_hold_the_same(tmp_path: Path) -> None:
    expected = random_imatrix(embedded_model(), tmp_path / "x.gguf")
    for file in (tmp_path / "x.gguf", write_dat(tmp_path / "x.dat", expected)):
        found = read_imatrix(file)
        assert found.entries.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found.entries[name], values)
        assert (found.dataset, found.chunks) == ("some text", 7)
    assert read_imatrix(write_dat(tmp_path / "bare.dat", expected, tail=b"")).chunks == 0


def test_metadata_is_llama_quantizes(tmp_path: Path) -> None:
    random_imatrix(embedded_model(), tmp_path / "x.gguf")
    plan = plan_conversion(embedded_model(), outtype="q4_k_m", imatrix=tmp_path / "x.gguf")
    found = {key: value.value for key, value in plan.metadata.items() if key.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": str(tmp_path / "x.gguf"),
        "quantize.imatrix.dataset": "some text",
        "quantize.imatrix.entries_count": len(read_imatrix(tmp_path / "x.gguf").entries),
        "quantize.imatrix.chunks_count": 7,
    }
    assert any("has no entry" in row.note for row in plan.rows if row.name == "token_embd.weight")


def test_missing_and_misshapen_entries_are_named(tmp_path: Path) -> None:
    entries = random_imatrix(embedded_model(), tmp_path / "x.gguf")
    name = "blk.1.ssm_out.weight"
    missing = write_dat(tmp_path / "missing.dat", {key: v for key, v in entries.items() if key != name})
    with pytest.raises(PlanError, match=name):
        plan_conversion(embedded_model(), outtype="q4_k_m", imatrix=missing, imatrix_strict=True)
    # llama-quantize warns and goes on without importance; so do the plans, with a note.
    rows = {
        row.name: row for row in plan_conversion(embedded_model(), outtype="q4_k_m", imatrix=missing).rows
    }
    assert rows[name].importance is None
    assert "no entry" in rows[name].note
    assert rows["blk.1.ssm_in.weight"].importance is not None
    scheme = plan_quantization(embedded_model(), "w4a16-g128", imatrix=read_imatrix(missing))
    assert any("no entry for" in note and "layers.1.mamba.out_proj" in note for note in scheme.notes)
    other = write_dat(tmp_path / "other.dat", {"blk.0.other.weight": np.ones(4, np.float32)})
    with pytest.raises(PlanError, match=r"any tensor of this model"):
        plan_conversion(embedded_model(), outtype="q4_k_m", imatrix=other)
    misshapen = write_dat(tmp_path / "misshapen.dat", entries | {name: np.ones(7, np.float32)})
    with pytest.raises(PlanError, match=rf"{name}[\s\S]*7 values[\s\S]*512"):
        plan_conversion(embedded_model(), outtype="q4_k_m", imatrix=misshapen)
    # Nothing to weigh in a file of plain numbers.
    assert plan_conversion(embedded_model(), outtype="bf16", imatrix=missing).rows


def test_files_that_are_none(tmp_path: Path) -> None:
    entries = {"a": np.ones(4, np.float32)}
    whole = write_dat(tmp_path / "x.dat", entries).read_bytes()
    for size in (0, 2, 6, 9, 20):
        (tmp_path / "cut.dat").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.dat"):
            read_imatrix(tmp_path / "cut.dat")
    for value in (np.nan, np.inf, -1):
        write_dat(tmp_path / "bad.dat", {"a": np.full(4, value, np.float32)})
        with pytest.raises(CheckpointError, match="tensor a"):
            read_imatrix(tmp_path / "bad.dat")
    with pytest.raises(CheckpointError, match="is not an importance matrix"):
        read_imatrix(to_gguf(embedded_model(), tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        read_imatrix(tmp_path / "nowhere")
