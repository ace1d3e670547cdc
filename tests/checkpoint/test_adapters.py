"""An adapter beside a model is refused or, by choice, ignored with a note; one alone is named as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.huggingface import ADAPTER_FILES
from bamba_quant.errors import CheckpointError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.quantize import plan_quantization
from tests.support.models import random_bamba, save_checkpoint


def open_config_only(path: Path, **reading: Any) -> Model:
    (path / "model.safetensors").unlink(missing_ok=True)
    return open_model(path, weights="optional", **reading)


READERS = {
    "load_model": load_model,
    "convert": lambda path, **reading: plan_conversion(path, vocab=False, **reading),
    "quantize": lambda path, **reading: plan_quantization(path, "fp8-dynamic", **reading),
    "config_only": open_config_only,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_bamba(), tmp_path_factory.mktemp("adapter") / "m")


def with_adapter(model: Path, place: Path, *files: str) -> Path:
    shutil.copytree(model, place)
    for name in files or ADAPTER_FILES[:2]:
        (place / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/Base"}))
    return place


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_refused_by_every_reader(reader: str, name: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"adapter[\s\S]*{name}[\s\S]*merge_and_unload[\s\S]*--ignore-adapter"
    ):
        READERS[reader](with_adapter(model, tmp_path / "m", name))


@pytest.mark.parametrize("reader", READERS)
def test_ignored_by_choice_with_a_note(reader: str, model: Path, tmp_path: Path) -> None:
    directory = with_adapter(model, tmp_path / "m")
    found = READERS[reader](directory, reading=ReadOptions(ignore_adapter=True))
    notes = (
        found.checkpoint.notes
        if reader in ("load_model", "config_only")
        else getattr(found, "plan", found).notes
    )
    assert any("LORA" in note and "acme/Base" in note for note in notes)


def test_inspection_remarks_on_it(model: Path, tmp_path: Path) -> None:
    found = inspect_path(with_adapter(model, tmp_path / "m"))
    assert any("adapter" in remark for remark in found.remarks)
    assert len(found.tensors) == len(inspect_path(model).tensors)


def test_an_adapter_alone(model: Path, tmp_path: Path) -> None:
    directory = with_adapter(model, tmp_path / "m")
    (directory / "config.json").unlink()
    (directory / "model.safetensors").unlink()
    for reading in (ReadOptions(), ReadOptions(ignore_adapter=True)):
        for read in (*READERS.values(), open_model):
            with pytest.raises(CheckpointError, match=r"an adapter, not a model[\s\S]*acme/Base[\s\S]*merge"):
                read(directory, reading=reading)
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        inspect_path(directory)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"peft_type": [1], "base_model_name_or_path": {"a": 1}}', b"\xff"]
)
def test_a_damaged_adapter_is_still_one(content: bytes, model: Path, tmp_path: Path) -> None:
    directory = with_adapter(model, tmp_path / "m")
    (directory / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="an adapter is stored beside the model"):
        load_model(directory)
