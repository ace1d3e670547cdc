"""Checkpoint directories as they come, and every way in which they can be broken."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.errors import CheckpointError
from bamba_quant.planning.model import open_model
from tests.support.models import random_bamba, save_checkpoint

TENSORS = {
    "a": torch.randn(6, 8),
    "b": torch.randn(3, 5).to(torch.bfloat16),
    "c": torch.randn(7).to(torch.float16),
    "d": torch.randn(4, 1, 4).to(torch.bfloat16),
    "empty": torch.empty(0, 4),
}


def directory(path: Path, **files: dict[str, torch.Tensor]) -> Path:
    """A directory with config.json and the given shards, with an index when there are several."""
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors", metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {key: f"{name}.safetensors" for name, tensors in files.items() for key in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "huggingface"
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        found = read_tensor(checkpoint.tensors[name])
        assert found.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


def test_one_safetensors_file(tmp_path: Path) -> None:
    assert_holds(directory(tmp_path, model=TENSORS), load_file(tmp_path / "model.safetensors"))


def test_shards_with_index(tmp_path: Path) -> None:
    halves = {"x": {"a": TENSORS["a"], "c": TENSORS["c"]}, "y": {"b": TENSORS["b"]}}
    assert_holds(directory(tmp_path, **halves), halves["x"] | halves["y"])


def test_shards_without_index(tmp_path: Path) -> None:
    halves = {"model-1": {"a": TENSORS["a"]}, "model-2": {"b": TENSORS["b"]}}
    directory(tmp_path, **halves)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(tmp_path, halves["model-1"] | halves["model-2"])


def test_pytorch_bin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tied = TENSORS | {"tied": TENSORS["a"]}
    torch.save(tied, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path, tied)


def test_pytorch_bin_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": TENSORS["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": TENSORS["b"]}, tmp_path / "pytorch_model-2.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_holds(tmp_path, {"a": TENSORS["a"], "b": TENSORS["b"]})


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pickled-code-ran"),))


@pytest.mark.parametrize(
    "content", [{"a": Malicious()}, {"a": "text"}, [1, 2], {"a": torch.ones(2, dtype=torch.int32)}]
)
def test_pytorch_bin_with_anything_but_weights(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)
    assert not Path("pickled-code-ran").exists()


def test_pytorch_bin_out_of_order_or_old(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.randn(4, 6).T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="contiguous"):
        open_checkpoint(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a zip archive"):
        open_checkpoint(tmp_path)


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def rewrite_header(file: Path, change: Any) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    packed = json.dumps(header).encode()
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + raw[8 + length :])


def test_truncated_shard(tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    file = tmp_path / "model.safetensors"
    truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"truncated[\s\S]*model\.safetensors, tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_truncated_header(size: int, tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(CheckpointError, match="Git LFS"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda header: header["a"].update(dtype="F8_E4M3"), "F8_E4M3"),
        (lambda header: header["a"].update(shape=[6, 9]), "does not fit its shape"),
        (lambda header: header["a"].pop("shape"), "malformed"),
        (lambda header: header.update(a=3), "malformed"),
        (lambda header: header["a"].update(shape=[6.0, 8.0]), "malformed"),
        (lambda header: header["a"].update(shape=[True, 48]), "malformed"),
        (lambda header: header["a"].update(shape=[-6, -8]), "malformed"),
        (lambda header: header["a"].update(shape="68"), "malformed"),
        (lambda header: header["a"].update(shape=[math.inf, 8]), "malformed"),
        (lambda header: header["a"].update(dtype=["F32"]), "malformed"),
        (lambda header: header["a"].update(data_offsets=[-8, 184]), "malformed"),
        (lambda header: header["a"].update(data_offsets=[192, 0]), "does not fit"),
    ],
)
def test_bad_entry(change: Any, complaint: str, tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    rewrite_header(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=complaint) as error:
        open_checkpoint(tmp_path)
    assert "tensor a" in str(error.value)


def test_a_tensor_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    directory(tmp_path, model={"a": torch.zeros(4), "b": torch.ones(4)})
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    packed = raw[8 : 8 + length].rstrip()[:-1] + b', "a": {"dtype":"F32","shape":[4],"data_offsets":[16,32]}}'
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"twice[\s\S]*'a'"):
        open_checkpoint(tmp_path)


def overlap(header: Any) -> None:
    header["b"]["data_offsets"] = header["a"]["data_offsets"]


@pytest.mark.parametrize(
    ("change", "complaint"), [(overlap, "overlap"), (lambda header: header.pop("a"), "gap|behind")]
)
def test_tensors_do_not_tile_the_file(change: Any, complaint: str, tmp_path: Path) -> None:
    directory(tmp_path, model={"a": torch.zeros(4), "b": torch.ones(4), "c": torch.ones(4)})
    rewrite_header(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(tmp_path)


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    with (tmp_path / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CheckpointError, match="after its last tensor"):
        open_checkpoint(tmp_path)


REPACKED = {f"t{i}": torch.randn(1000 + i) for i in range(3)} | {"twin": torch.randn(1000)}


def repack(path: Path, compression: Any = lambda name: zipfile.ZIP_STORED, order: Any = list) -> None:
    """The .bin file of ``REPACKED`` as a zip tool leaves it when it unpacks and packs again."""
    (path / "config.json").write_text("{}")
    torch.save(REPACKED, path / "original")
    with zipfile.ZipFile(path / "original") as old, zipfile.ZipFile(path / "pytorch_model.bin", "w") as new:
        for name in order(old.namelist()):
            new.writestr(name, old.read(name), compression(name))


@pytest.mark.parametrize("order", [list, sorted, lambda names: names[::-1]])
def test_a_repacked_bin_file(order: Any, tmp_path: Path) -> None:
    repack(tmp_path, order=order)
    assert_holds(tmp_path, REPACKED)


@pytest.mark.parametrize("which", ["/data/0", "/data/3", "/"])
def test_a_compressed_bin_file(which: str, tmp_path: Path) -> None:
    repack(tmp_path, lambda name: zipfile.ZIP_DEFLATED if which in name else zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match=r"compressed[\s\S]*zip entry .*/data"):
        open_checkpoint(tmp_path)


def test_a_bin_file_with_a_record_of_another_size(tmp_path: Path) -> None:
    repack(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "whole")
    with (
        zipfile.ZipFile(tmp_path / "whole") as old,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 40 if name.endswith("/data/1") else None])
    with pytest.raises(CheckpointError, match=r"differ in size[\s\S]*t1[\s\S]*40 bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 5000, -10])
def test_truncated_bin_file(size: int, tmp_path: Path) -> None:
    repack(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_shards_beside_a_single_file(single: str, tmp_path: Path) -> None:
    if single == "model.safetensors":
        directory(tmp_path, x={"a": TENSORS["a"]}, y={"b": TENSORS["b"]})
        save_file({"a": TENSORS["a"]}, tmp_path / single)
    else:
        (tmp_path / "config.json").write_text("{}")
        torch.save({"a": TENSORS["a"]}, tmp_path / "x.bin")
        torch.save({"a": TENSORS["a"]}, tmp_path / single)
        (tmp_path / f"{single}.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    with pytest.raises(CheckpointError, match=rf"two copies[\s\S]*{single} and {single}\.index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", [5, [], None, "", "a\0b", "x" * 300, "../x.safetensors", "/etc/passwd", ".", ".."]
)
def test_an_index_that_names_no_file(shard: Any, tmp_path: Path) -> None:
    directory(tmp_path, x={"a": TENSORS["a"]}, y={"b": TENSORS["b"]})
    weight_map = {"a": "x.safetensors", "b": shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_a_read_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(directory(tmp_path, model=TENSORS))

    def broken(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors[\s\S]*Input/output error"):
        read_tensor(checkpoint.tensors["a"])


def test_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bamba"}')
    checkpoint = open_checkpoint(tmp_path, weights=False)
    assert (checkpoint.metadata["model_type"], checkpoint.tensors, checkpoint.n_bytes) == ("bamba", {}, 0)


def test_a_source_without_weights(tmp_path: Path) -> None:
    save_checkpoint(random_bamba(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    source = open_model(tmp_path, weights="none")
    assert source.config.vocab_size == 160
    assert source.pairs == ()
    with pytest.raises(CheckpointError, match="no weights"):
        open_model(tmp_path)


def index_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "model.safetensors.index.json").read_text())


def test_index_against_shards(tmp_path: Path) -> None:
    directory(tmp_path, x={"a": TENSORS["a"]}, y={"b": TENSORS["b"]})
    index_file = tmp_path / "model.safetensors.index.json"
    good = index_of(tmp_path)
    index_file.write_text(json.dumps({"weight_map": good["weight_map"] | {"z": "z.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"are missing[\s\S]*z\.safetensors"):
        open_checkpoint(tmp_path)
    index_file.write_text(json.dumps({"weight_map": good["weight_map"] | {"lost": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="lost"):
        open_checkpoint(tmp_path)
    save_file({"a": TENSORS["a"], "extra": TENSORS["b"]}, tmp_path / "x.safetensors")
    index_file.write_text(json.dumps(good))
    with pytest.raises(CheckpointError, match="extra"):
        open_checkpoint(tmp_path)
    index_file.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(tmp_path)


def test_two_files_with_one_tensor(tmp_path: Path) -> None:
    directory(tmp_path, **{"model": {"a": TENSORS["a"]}, "model-2": {"a": TENSORS["a"]}})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="same tensor"):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(CheckpointError, match="JSON"):
        open_checkpoint(tmp_path)
