"""A Hugging Face checkpoint directory: its configuration and its tensors, checked against its index."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bamba_quant.checkpoint.adapters import adapter_notes
from bamba_quant.checkpoint.base import Checkpoint, StoredTensor
from bamba_quant.checkpoint.options import ReadOptions
from bamba_quant.checkpoint.quantized import is_quantized, join
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import CheckpointError, listed
from bamba_quant.files.json_file import read_json, required
from bamba_quant.files.regular_file import is_there

__all__ = ["read_huggingface", "read_json"]

Tensors = dict[str, StoredTensor]
ReadFile = Callable[[Path], Tensors]

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


def read_huggingface(
    directory: Path, *, weights: bool = True, reading: ReadOptions = ReadOptions()
) -> Checkpoint:
    """The checkpoint in ``directory``, headers only; without ``weights`` its configuration alone.

    Raises ``CheckpointError`` for a missing configuration or weights, an index that names a missing shard or
    tensor, a shard holding tensors the index does not know, two copies of the weights side by side, and an adapter
    that is not to be ignored.
    """
    # Without weights an adapter changes nothing, but in a directory without config.json the error must name it.
    notes = adapter_notes(directory, ignore=reading.ignore_adapter or not weights)
    config = read_json(directory / "config.json", "config.json is what says which model this is")
    if not weights:
        return Checkpoint(directory, "huggingface", config, {}, notes=notes)
    quantized = is_quantized(config)
    for index_name, single_name, pattern, read in _LAYOUTS:
        if quantized and read is read_safetensors:
            read = partial(read_safetensors, quantized=True)
        index = directory / index_name
        if is_there(index):
            tensors, more = _indexed(index, single_name, read)
            notes += more
        elif files := sorted(directory.glob(pattern)):
            tensors = _merged(files, read)
        else:
            continue
        if not tensors:
            raise CheckpointError("the checkpoint's files hold no tensor", where=directory)
        used = tuple(sorted({tensor.file for tensor in tensors.values()}))
        if reading.strip_prefix:
            tensors, more = _stripped(tensors, reading.strip_prefix)
            notes += more
        if not quantized:
            return Checkpoint(directory, "huggingface", config, tensors, used, notes=notes)
        found = join(config, tensors, directory, reading.strip_prefix)
        return Checkpoint(directory, "huggingface", config, found.weights, used, found.unused, notes)
    raise CheckpointError(
        "the directory holds no weights",
        where=directory,
        found=", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "an empty directory",
        expected="model.safetensors, its shards with model.safetensors.index.json, pytorch_model.bin or "
        "consolidated.safetensors",
    )


def _stripped(tensors: Tensors, prefix: str) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors without ``prefix`` before their names, and a note that says how many had it."""
    stripped: Tensors = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(prefix)
        if bare in stripped:
            raise CheckpointError(
                "two tensors have the same name without the prefix",
                where=tensor.file,
                found=f"{bare}, with and without {prefix!r}",
                fix="leave out --strip-prefix, or remove one of the two from the checkpoint",
            )
        stripped[bare] = replace(tensor, name=bare)
    count = sum(name.startswith(prefix) for name in tensors)
    return stripped, ((f"removed {prefix!r} from {count} of {len(tensors)} tensor names",) if count else ())


def _indexed(index: Path, single_name: str, read: ReadFile) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of all shards, and notes on the index.

    An output matrix that the index lists and no shard stores is accepted, because some tools list it where it is tied
    to the embedding. Where it is not tied, matching the tensors with the configuration finds that it is missing.
    """
    weight_map = required(
        read_json(index, "the index of the shards"), "weight_map", dict, index, CheckpointError
    )
    for name, shard_name in weight_map.items():
        if not isinstance(shard_name, str) or not _is_file_name(shard_name):
            raise CheckpointError(
                "the index places a tensor in something that is not a file of its directory",
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
    tensors: Tensors = {}
    notes: list[str] = []
    placed: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        placed.setdefault(file_name, set()).add(name)
    for file_name, promised in sorted(placed.items()):
        shard = read(index.parent / file_name)
        unstored = {name for name in promised - shard.keys() if _is_output(name)}
        promised -= unstored
        notes += [f"{index.name} lists {name}, which {file_name} does not hold" for name in unstored]
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
    return tensors, tuple(notes)


def _is_output(name: str) -> bool:
    """Whether a tensor is the output matrix, which a model may tie to its embedding."""
    return f".{name}".endswith(".lm_head.weight")


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and len(name.encode()) <= _MOST_NAME


def _merged(files: list[Path], read: ReadFile) -> Tensors:
    tensors: Tensors = {}
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
