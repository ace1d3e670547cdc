"""What a checkpoint or GGUF file is, in numbers: architecture, layers, tensors, types, sizes, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, LlamaFileType

from bamba_quant.checkpoint import Checkpoint, ReadOptions, StoredTensor, open_checkpoint
from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.errors import ArchitectureError, BambaQuantError, CheckpointError
from bamba_quant.families import family_of, family_of_gguf, read_config
from bamba_quant.families.gguf_keys import gguf_architecture_of
from bamba_quant.families.hf_schema import MOST_LAYERS
from bamba_quant.families.rules import Tensors
from bamba_quant.files.names import CONFIG
from bamba_quant.hub import local_path
from bamba_quant.metadata.tune_record import TuneRecord, read_record
from bamba_quant.planning.model import directory_of, has_weights, open_model, unused_note
from bamba_quant.planning.row_order import needs_repair
from bamba_quant.printable import brief_repr
from bamba_reference.config import has_attention


@dataclass(frozen=True)
class FormatTotal:
    """Tensors, weights and bytes stored in one number format."""

    name: str
    tensors: int
    elements: int
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """``layers`` names each layer's kind where the architecture is known; ``remarks`` are warnings for the user.

    ``tuned`` is what the files say of how their rounding was tuned.
    """

    checkpoint: Checkpoint
    architecture: str
    layers: tuple[str, ...]
    metadata: Mapping[str, Any]
    remarks: tuple[str, ...]
    tuned: TuneRecord | None = None

    __repr__ = brief_repr

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(self.checkpoint.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.checkpoint.n_bytes / max(1, self.checkpoint.elements)

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        """Totals by number format, the largest first."""
        names = {tensor.format.name for tensor in self.tensors}
        totals = []
        for name in names:
            stored = [tensor for tensor in self.tensors if tensor.format.name == name]
            totals.append(
                FormatTotal(
                    name, len(stored), sum(t.elements for t in stored), sum(t.n_bytes for t in stored)
                )
            )
        return tuple(sorted(totals, key=lambda total: -total.n_bytes))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layers) if has_attention(kind))


def inspect_path(path: str | Path) -> Inspection:
    """Inspect a Hugging Face directory or a GGUF file, reading headers only; of any architecture.

    A directory of a config.json alone, or that file, shows the tensors it implies, if its architecture is known.
    Raises ``CheckpointError`` when it is not a readable checkpoint or GGUF file.
    """
    directory, reading = directory_of(local_path(path, headers=True)), ReadOptions(ignore_adapter=True)
    if (directory / CONFIG).is_file() and not has_weights(directory):
        model = open_model(directory, weights="optional", reading=reading)
        found = _inspect_huggingface(model.checkpoint)
        return replace(found, remarks=(*found.remarks, *model.notes))
    checkpoint = open_checkpoint(directory, reading=reading)
    found = _inspect_gguf(checkpoint) if checkpoint.kind == "gguf" else _inspect_huggingface(checkpoint)
    try:
        return replace(found, tuned=read_record(checkpoint))
    except CheckpointError as error:
        return replace(found, remarks=(*found.remarks, str(error)))


def _inspect_huggingface(checkpoint: Checkpoint) -> Inspection:
    hf = checkpoint.metadata
    classes = hf.get("architectures")
    names = [each for each in classes if isinstance(each, str)] if isinstance(classes, list) else []
    name = ", ".join(names) or str(hf.get("model_type"))
    remarks = (*checkpoint.notes, *((unused_note(checkpoint),) if checkpoint.unused else ()))
    try:
        # state-spaces' own configurations name neither.
        family = family_of(hf).name
        name = name if classes else family
        layers = read_config(hf).layer_types
    except BambaQuantError as error:
        return Inspection(checkpoint, name, (), hf, (*remarks, str(error)))
    return Inspection(checkpoint, name, layers, hf, remarks)


def _inspect_gguf(checkpoint: Checkpoint) -> Inspection:
    values = checkpoint.key_values
    name = "unknown"
    layers: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    try:
        name = gguf_architecture_of(values) or name
        if not isinstance(needs_repair(values), str):
            remarks = (
                "written by another tool, with a partial rotary embedding: llama.cpp's converter puts q and k rows "
                "of such files in the wrong order; `bamba-quant repair` puts them right",
            )
        layers = _gguf_layers(name, values, checkpoint.tensors)
    except BambaQuantError as error:  # a file whose key-values are invalid is still listed
        remarks = (*remarks, str(error))
    return Inspection(checkpoint, name, layers, _printable(values), remarks)


def _gguf_layers(name: str, values: KeyValues, tensors: Tensors) -> tuple[str, ...]:
    """Each layer's kind. Of an architecture not known, a layer without key-value heads is a Mamba layer.

    A count instead of a list means attention everywhere.
    """
    try:
        return family_of_gguf(values).config_of_gguf(values, tensors).layer_types
    except ArchitectureError:
        pass
    kv_heads, blocks = f"{name}.attention.head_count_kv", values.integer(f"{name}.block_count")
    if kv_heads not in values or blocks is None:
        return ()
    if values.is_array(kv_heads):
        each = values.integers(kv_heads) or []
    else:
        each = [values.integer(kv_heads) or 0] * min(blocks, MOST_LAYERS)
    return tuple("attention" if heads else "mamba" for heads in each)


def _printable(values: KeyValues, most: int = 64) -> dict[str, Any]:
    """Key-values as plain Python, arrays longer than ``most`` as their length and first items."""
    printable: dict[str, Any] = {}
    for key, value in values.items():
        if value.type == GGUFValueType.ARRAY and len(value.value) > most:
            printable[key] = {"length": len(value.value), "first": list(value.value[:4])}
        else:
            printable[key] = value.value
    file_type = printable.get(Keys.General.FILE_TYPE)
    if isinstance(file_type, int) and file_type in LlamaFileType._value2member_map_:
        printable["general.file_type (name)"] = LlamaFileType(file_type).name
    return printable
