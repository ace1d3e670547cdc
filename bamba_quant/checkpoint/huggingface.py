"""A Hugging Face checkpoint directory: its configuration and its tensors, checked against its index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bamba_quant.checkpoint.base import Checkpoint, StoredTensor
from bamba_quant.checkpoint.json_file import read_json
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import CheckpointError, listed

__all__ = ["read_huggingface", "read_json"]

ReadFile = Callable[[Path], dict[str, StoredTensor]]

# Looked for in this order, as transformers does: safetensors before pickles, an index before single files.
_LAYOUTS: tuple[tuple[str, str, ReadFile], ...] = (
    ("model.safetensors.index.json", "model*.safetensors", read_safetensors),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch_file),
)


def read_huggingface(directory: Path) -> Checkpoint:
    """The checkpoint in ``directory``, headers only.

    Raises ``CheckpointError`` for a missing configuration or weights, an index that names a missing shard or
    tensor, and a shard holding tensors the index does not know.
    """
    config = read_json(directory / "config.json", "config.json is what says which model this is")
    for index_name, pattern, read in _LAYOUTS:
        index = directory / index_name
        if index.is_file():
            tensors = _indexed(index, read)
        elif files := sorted(directory.glob(pattern)):
            tensors = _merged(files, read)
        else:
            continue
        if not tensors:
            raise CheckpointError("the checkpoint's files hold no tensor", where=directory)
        used = tuple(sorted({tensor.file for tensor in tensors.values()}))
        return Checkpoint(directory, "huggingface", config, tensors, used)
    raise CheckpointError(
        "the directory holds no weights",
        where=directory,
        found=", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "an empty directory",
        expected="model.safetensors, its shards with model.safetensors.index.json, or pytorch_model.bin",
    )


def _indexed(index: Path, read: ReadFile) -> dict[str, StoredTensor]:
    weight_map = read_json(index, "the index of the shards").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError("the index has no weight_map", where=index)
    missing = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if missing:
        raise CheckpointError(
            "the index names shards that are not there",
            where=index,
            found=", ".join(missing),
            fix="fetch the missing files",
        )
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        shard = read(index.parent / file_name)
        promised = {name for name, file in weight_map.items() if file == file_name}
        for complaint, names in (
            ("the index promises tensors that a shard does not hold", promised - shard.keys()),
            ("a shard holds tensors that the index does not place there", shard.keys() - promised),
        ):
            if names:
                raise CheckpointError(
                    complaint,
                    where=index.parent / file_name,
                    found=listed(sorted(names)),
                    fix="fetch index and shards of one version",
                )
        tensors |= shard
    return tensors


def _merged(files: list[Path], read: ReadFile) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = read(file)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                "two files hold the same tensor and no index decides",
                where=file,
                found=f"{twice[0]}, also in {tensors[twice[0]].file.name}",
                fix="leave one copy of the weights in the directory",
            )
        tensors |= shard
    return tensors
