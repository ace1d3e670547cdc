"""Tensor names behind a prefix, which is named and can be removed, and an output that only the index has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.codecs import SafetensorsCodec, codecs
from bamba_quant.errors import CheckpointError, PlanError
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.model import open_model
from tests.checkpoint.conftest import Made
from tests.support.models import random_bamba, save_checkpoint
from tests.support.quantized import read_all

PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod.")


def prefixed(directory: Path, prefix: str, only: str = "") -> Path:
    file = directory / "model.safetensors"
    named = {(prefix if only in name else "") + name: tensor for name, tensor in load_file(file).items()}
    save_file(named, file, {"format": "pt"})
    return directory


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_named_and_removed(prefix: str, tmp_path: Path) -> None:
    plain = save_checkpoint(random_bamba(), tmp_path / "plain")
    directory = prefixed(save_checkpoint(random_bamba(), tmp_path / "m"), prefix)
    with pytest.raises(PlanError, match=rf"prefix[\s\S]*'{prefix}'[\s\S]*--strip-prefix {prefix} "):
        open_model(directory)
    reading = ReadOptions(strip_prefix=prefix)
    found, expected = load_model(directory, reading=reading), load_model(plain)
    assert list(found.weights) == list(expected.weights)
    assert all(np.array_equal(found.weights[name], expected.weights[name]) for name in expected.weights)
    assert any(prefix in note for note in found.checkpoint.notes)
    assert plan_conversion(directory, vocab=False, reading=reading).rows
    assert not load_model(plain, reading=reading).checkpoint.notes


def test_a_prefix_of_some_names(tmp_path: Path) -> None:
    directory = prefixed(save_checkpoint(random_bamba(), tmp_path / "m"), "module.", only="mamba")
    with pytest.raises(PlanError, match="--strip-prefix"):
        open_model(directory)
    assert load_model(directory, reading=ReadOptions(strip_prefix="module.")).weights


def test_other_names_are_no_prefix(tmp_path: Path) -> None:
    directory = prefixed(save_checkpoint(random_bamba(), tmp_path / "m"), "x", only="mamba")
    with pytest.raises(PlanError, match="does not know"):
        open_model(directory)


def test_a_name_with_and_without_the_prefix(tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {f"module.{first}": tensors[first].clone()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"same name[\s\S]*{first}"):
        open_checkpoint(directory, reading=ReadOptions(strip_prefix="module."))


@pytest.mark.parametrize("scheme", codecs(SafetensorsCodec), ids=lambda scheme: scheme.name)
def test_a_prefix_of_quantized_tensors(scheme: SafetensorsCodec, made: Made, tmp_path: Path) -> None:
    source, prefix = made(scheme), "_orig_mod."
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    metadata = {}
    for file in source.glob("*.safetensors"):
        raw = file.read_bytes()
        metadata |= json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    renamed = {(prefix if "." in name else "") + name: text for name, text in metadata.items()}
    save_file({prefix + k: v for k, v in read_all(source).items()}, tmp_path / "model.safetensors", renamed)
    found = open_checkpoint(tmp_path, reading=ReadOptions(strip_prefix=prefix)).tensors
    expected = open_checkpoint(source).tensors
    assert {name: tensor.format.name for name, tensor in found.items()} == {
        name: tensor.format.name for name, tensor in expected.items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_an_index_that_lists_an_output_that_is_not_stored(tied: bool, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(tie_word_embeddings=True), tmp_path / "m", shards=2)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k != "lm_head.weight"}
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, shard, {"format": "pt"})
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = shard
    file.write_text(json.dumps(index))
    if tied:
        conversion = plan_conversion(directory, vocab=False)
        assert any("lm_head.weight" in note and shard in note for note in conversion.notes)
    else:
        with pytest.raises(PlanError, match=r"lm_head\.weight missing"):
            plan_conversion(directory, vocab=False)
    index["weight_map"]["model.final_layernorm.bias"] = shard
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"final_layernorm\.bias"):
        open_checkpoint(directory)
