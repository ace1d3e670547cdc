"""Checkpoint directories as they come, and every way in which they can be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.errors import CheckpointError

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
    with pytest.raises(CheckpointError, match="one piece"):
        open_checkpoint(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="no zip archive"):
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
    ],
)
def test_bad_entry(change: Any, complaint: str, tmp_path: Path) -> None:
    directory(tmp_path, model=TENSORS)
    rewrite_header(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=complaint) as error:
        open_checkpoint(tmp_path)
    assert "tensor a" in str(error.value)


def index_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "model.safetensors.index.json").read_text())


def test_index_against_shards(tmp_path: Path) -> None:
    directory(tmp_path, x={"a": TENSORS["a"]}, y={"b": TENSORS["b"]})
    index_file = tmp_path / "model.safetensors.index.json"
    good = index_of(tmp_path)
    index_file.write_text(json.dumps({"weight_map": good["weight_map"] | {"z": "z.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"not there[\s\S]*z\.safetensors"):
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
