"""A Hugging Face checkpoint directory: its configuration and its tensors, checked against its index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.base import Checkpoint, ReadOptions, StoredTensor
from bamba_quant.checkpoint.compressed_tensors import CACHE_SCALE
from bamba_quant.checkpoint.modelopt import separate_configuration
from bamba_quant.checkpoint.quantized import assemble_weights, is_quantized
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import CheckpointError, PlanError, join_names, repr_short
from bamba_quant.files.json_file import JSON_BYTES, parse_json, read_json, required
from bamba_quant.files.reading import lexists, read_bytes

__all__ = ["read_huggingface", "read_json"]

Tensors = dict[str, StoredTensor]
ReadFile = Callable[[Path], Tensors]

# Index, single file, pattern of all: safetensors before pickles, as transformers looks for them, then mistral's name
# for Codestral-Mamba's weights; its directory has transformers' shards too.
LAYOUTS: tuple[tuple[str, str, str, ReadFile], ...] = (
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
    directory: Path,
    *,
    weights: bool = True,
    allow_quantized: bool = True,
    reading: ReadOptions = ReadOptions(),
) -> Checkpoint:
    """The checkpoint in ``directory``, headers only; without ``weights`` its configuration alone.

    Raises ``CheckpointError`` for a missing configuration or weights, an index that names a missing shard or
    tensor, a shard with tensors that are not in the index, two copies of the weights, an adapter without
    ``ignore_adapter``, and, unless ``allow_quantized``, a quantized checkpoint.
    """
    # Without weights an adapter changes nothing; without config.json it is the cause, and the error names it.
    notes = adapter_notes(directory, ignore=reading.ignore_adapter or not weights)
    file = directory / "config.json"
    raw = read_bytes(file, "config.json is what says which model this is", JSON_BYTES)
    config = parse_json(raw, file)
    if not is_quantized(config) and (separate := separate_configuration(directory)):
        config |= {"quantization_config": separate}
    quantized = is_quantized(config)
    if quantized and not allow_quantized:
        raise _quantized_already(config, file)
    found = Checkpoint(directory, "huggingface", config, {}, notes=notes, config_text=raw)
    if not weights:
        return found
    for index_name, single_name, pattern, read in LAYOUTS:
        if quantized and read is read_safetensors:
            read = partial(read_safetensors, quantized=True)
        index = directory / index_name
        if lexists(index):
            tensors, more = _read_indexed(index, single_name, read)
            notes += more
        elif files := sorted(directory.glob(pattern)):
            tensors = _read_unindexed(files, read)
        else:
            continue
        if not tensors:
            raise CheckpointError("the checkpoint's files hold no tensor", where=directory)
        used = tuple(sorted({tensor.file for tensor in tensors.values()}))
        if reading.strip_prefix:
            tensors, more = _strip_prefix(tensors, reading.strip_prefix)
            notes += more
        if not quantized:
            return replace(found, tensors=tensors, files=used, notes=notes)
        assembled, unused = assemble_weights(config, tensors, directory, reading.strip_prefix)
        scales = {name: tensors[name] for name in unused if CACHE_SCALE.search(name)}
        return replace(found, tensors=assembled, files=used, unused=unused, cache_scales=scales, notes=notes)
    raise CheckpointError(
        "the directory holds no weights",
        where=directory,
        found=", ".join(sorted(entry.name for entry in directory.iterdir())[:12]) or "an empty directory",
        expected="model.safetensors, its shards with model.safetensors.index.json, pytorch_model.bin or "
        "consolidated.safetensors",
    )


def _quantized_already(config: Mapping[str, Any], file: Path) -> PlanError:
    quantization = config["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return PlanError(
        "the input is quantized already, and quantizing it again loses more than quantizing the original",
        where=file,
        found=f"quantization_config, quant_method {repr_short(method)}",
        expected="f32, f16 or bf16 weights",
        fix="give the original",
    )


def _strip_prefix(tensors: Tensors, prefix: str) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors without ``prefix`` before their names, and a note with the number of names that had it."""
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


def _read_indexed(index: Path, single_name: str, read: ReadFile) -> tuple[Tensors, tuple[str, ...]]:
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
                "the index maps a tensor to something that is not a file of its directory",
                where=f"{index}, tensor {name}",
                found=repr_short(shard_name),
                expected="a file name without a path",
            )
    shards = set(weight_map.values())
    if single_name not in shards and (index.parent / single_name).is_file():
        raise CheckpointError(
            "the directory holds two copies of the weights: transformers reads the single file, others the shards",
            where=index.parent,
            found=f"{single_name} and {index.name}",
            expected="one of them",
            fix="remove one of them",
        )
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(
            "the index names shards that are missing",
            where=index,
            found=join_names(missing),
            fix="fetch the missing files",
        )
    tensors: Tensors = {}
    notes: list[str] = []
    placed: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        placed.setdefault(file_name, set()).add(name)
    for file_name, indexed in sorted(placed.items()):
        shard = read(index.parent / file_name)
        unstored = {name for name in indexed - shard.keys() if _is_output(name)}
        indexed -= unstored
        notes += [f"{index.name} lists {name}, which {file_name} does not hold" for name in unstored]
        for complaint, names in (
            ("a shard lacks tensors that the index maps to it", indexed - shard.keys()),
            ("a shard has tensors that the index does not map to it", shard.keys() - indexed),
        ):
            if names:
                raise CheckpointError(
                    complaint,
                    where=index.parent / file_name,
                    found=join_names(sorted(names)),
                    fix="fetch index and shards of one version",
                )
        tensors |= shard
    return tensors, tuple(notes)


def _is_output(name: str) -> bool:
    """Whether a tensor is the output matrix, which a model may tie to its embedding."""
    return f".{name}".endswith(".lm_head.weight")


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and "\0" not in name and len(name.encode()) <= _MOST_NAME


def _read_unindexed(files: list[Path], read: ReadFile) -> Tensors:
    tensors: Tensors = {}
    for file in files:
        shard = read(file)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                "two files hold the same tensor, and there is no index",
                where=file,
                found=f"{twice[0]}, also in {tensors[twice[0]].file.name}",
                fix="leave one copy of the weights in the directory",
            )
        tensors |= shard
    return tensors


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_MERGE = (
    "merge it: load the base model and the adapter with peft, call merge_and_unload(), then save_pretrained(), and "
    "give that directory"
)


def adapter_notes(directory: Path, *, ignore: bool) -> tuple[str, ...]:
    """A note for an adapter that is ignored; none where the directory has no adapter.

    transformers with peft installed applies an adapter that it finds beside a model. Raises ``CheckpointError``
    for an adapter that is not to be ignored, and for one without a base model.
    """
    found = [name for name in ADAPTER_FILES if lexists(directory / name)]
    if not found:
        return ()
    described = _describe_adapter(directory)
    if not lexists(directory / "config.json"):
        raise CheckpointError(
            "the directory holds an adapter, not a model",
            where=directory,
            found=f"{', '.join(found)}, but no config.json; {described}",
            expected="a model's config.json and weights",
            fix=_MERGE,
        )
    if not ignore:
        raise CheckpointError(
            "an adapter is stored beside the model; transformers with peft applies it, this program does not",
            where=directory,
            found=f"{', '.join(found)}; {described}",
            fix=f"{_MERGE}; or read the base model alone with --ignore-adapter",
        )
    return (f"the adapter beside the model is not applied ({', '.join(found)}; {described})",)


def _describe_adapter(directory: Path) -> str:
    """Type and base model of the adapter, from its configuration."""
    try:
        config = read_json(directory / ADAPTER_CONFIG, "the adapter's configuration")
    except CheckpointError as error:
        return f"its type and base model are unknown: {error.what}"
    kind, base = (
        value if isinstance(value := config.get(key), str) and len(value) < 200 else repr_short(value)
        for key in ("peft_type", "base_model_name_or_path")
    )
    return f"peft_type {kind}, base model {base}"
