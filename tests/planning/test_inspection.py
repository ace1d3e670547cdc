"""Inspection counts what is there, in both forms of a model, and survives models it does not know."""

from __future__ import annotations

import json
from pathlib import Path

from bamba_quant.embedded import embedded_model
from bamba_quant.planning.inspection import inspect_path
from tests.support.conversion import to_gguf
from tests.support.models import random_bamba, save_checkpoint


def test_directory_and_gguf_agree(tmp_path: Path) -> None:
    source = inspect_path(embedded_model())
    file = inspect_path(to_gguf(embedded_model(), tmp_path / "x.gguf", "q8_0"))
    assert source.layers == file.layers == ("mamba", "mamba", "attention", "mamba")
    assert source.attention_layers == (2,)
    assert source.checkpoint.elements == file.checkpoint.elements == 4_215_880
    assert source.bits_per_weight == 16
    assert 8.5 < file.bits_per_weight < 8.7
    assert {total.name for total in file.formats} == {"q8_0", "f32"}
    assert sum(total.n_bytes for total in file.formats) == file.checkpoint.n_bytes
    assert sum(total.tensors for total in file.formats) == len(file.tensors) == 51
    assert file.metadata["general.file_type (name)"] == "MOSTLY_Q8_0"
    assert file.metadata["tokenizer.ggml.tokens"]["length"] == 2048
    json.dumps(dict(file.metadata))


def test_unknown_architecture_is_shown_with_a_remark(tmp_path: Path) -> None:
    save_checkpoint(random_bamba(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    found = inspect_path(tmp_path)
    assert found.architecture == "OtherForCausalLM"
    assert found.layers == ()
    assert len(found.tensors) > 10
    assert "BambaForCausalLM" in found.remarks[0]
