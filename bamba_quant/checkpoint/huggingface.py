"""A Hugging Face checkpoint directory: its configuration and its tensors, checked against its index."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bamba_quant.checkpoint.base import Checkpoint, StoredTensor
from bamba_quant.checkpoint.json_file import read_json, required
from bamba_quant.checkpoint.quantized import is_quantized, join
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import CheckpointError, listed

__all__ = ["read_huggingface", "read_json"]

ReadFile = Callable[[Path], dict[str, StoredTensor]]

# Index, single file, pattern of all: safetensors before pickles, as transformers looks for them, then mistral's name
# for Codestral-Mamba's weights, which stand beside transformers' own shards in its directory.
_LAYOUTS: tuple[tuple[str, str, str, ReadFile], ...] = (
    ("model.safetensors.index.json", "model.safetensors", "model*.safetensors", read_safetensors),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin", read_torch_file),
    (
        "consolidated.safetensors.index.json",
        "consolidated.safetensors",
        "consolidated*.safetensors",
        read_safetensors,
    ),
)
_MOST_NAME = 255  # bytes of a file name, on every file system in use


def read_huggingface(directory: Path, *, weights: bool = True) -> Checkpoint:
    """The checkpoint in ``directory``, headers only; without ``weights`` its configuration alone.

    Raises ``CheckpointError`` for a missing configuration or weights, an index that names a missing shard or
    tensor, a shard holding tensors the index does not know, and two copies of the weights side by side.
    """
    config = read_json(directory / "config.json", "config.json is what says which model this is")
    if not weights:
        return Checkpoint(directory, "huggingface", config, {})
    quantized = is_quantized(config)
    for index_name, single_name, pattern, read in _LAYOUTS:
        if quantized and read is read_safetensors:
            read = partial(read_safetensors, quantized=True)
        index = directory / index_name
        if index.is_file():
            tensors = _indexed(index, single_name, read)
        elif files := sorted(directory.glob(pattern)):
            tensors = _merged(files, read)
        else:
            continue
        if not tensors:
            raise CheckpointError("the checkpoint's files hold no tensor", where=directory)
        used = tuple(sorted({tensor.file for tensor in tensors.values()}))
        if not quantized:
            return Checkpoint(directory, "huggingface", config, tensors, used)
        found = join(config, tensors, directory)
        return Checkpoint(directory, "huggingface", config, found.weights, used, found.unused)
    raise CheckpointError(
        "the directory holds no weights",
        where=directory,
        found=", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "an empty directory",
        expected="model.safetensors, its shards with model.safetensors.index.json, pytorch_model.bin or "
        "consolidated.safetensors",
    )


def _indexed(index: Path, single_name: str, read: ReadFile) -> dict[str, StoredTensor]:
    weight_map = required(
        read_json(index, "the index of the shards"), "weight_map", dict, index, CheckpointError
    )
    for name, shard_name in weight_map.items():
        if not isinstance(shard_name, str) or not _is_file_name(shard_name):
            raise CheckpointError(
                "the index places a tensor in something that is no file of its directory",
                where=f"{index}, tensor {name}",
                found=reprlib.repr(shard_name),
                expected="a file name without a path",
            )
    shards = set(weight_map.values())
    if single_name not in shards and (index.parent / single_name).is_file():
        raise CheckpointError(
            "the directory holds two copies of the weights: transformers reads the single file, others the shards",
            where=index.parent,
            found=f"{single_name} and {index.name}",
            expected="one of them",
            fix="move the one that is not wanted away",
        )
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(
            "the index names shards that are not there",
            where=index,
            found=listed(missing),
            fix="fetch the missing files",
        )
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(shards):
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


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and len(name.encode()) <= _MOST_NAME


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
