"""Repairs GGUF files whose q and k rows llama.cpp's converter put in the wrong order, without loss in any format.

The converter interleaves all rows of every head although a partial rotary embedding rotates only the first ones
(its conversion/llama.py ``permute``, called for Bamba from conversion/granite.py). A row is quantized on its
own, so putting rows right loses nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import Keys

from bamba_quant.checkpoint import Checkpoint, StoredTensor
from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.checkpoint.gguf_header import padded_size
from bamba_quant.checkpoint.gguf_values import KeyValues, string
from bamba_quant.errors import CheckpointError
from bamba_quant.families.hf_reading import MOST_HEAD_DIM
from bamba_quant.families.transforms import IDENTITY, Transform, interleaved_order, permuted_rows
from bamba_quant.metadata.general import TOOL_VERSION_KEY, tool_version_key
from bamba_quant.planning.plan import Plan, PlanRow

ARCHITECTURE = "granitehybrid"
_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)$")


@dataclass(frozen=True)
class Rotary:
    """Rows of an attention head, and how many of them the model rotates."""

    head_dim: int
    rotary_dim: int


def needs_repair(metadata: KeyValues) -> Rotary | str:
    """The rotary geometry when a GGUF's key-values say its q/k rows are misplaced, else why they do not.

    Raises ``CheckpointError`` for key-values of another type.
    """
    architecture = metadata.text(Keys.General.ARCHITECTURE)
    if architecture != ARCHITECTURE:
        return f"its architecture is {architecture!r}, not {ARCHITECTURE!r}"
    if TOOL_VERSION_KEY in metadata:
        return f"bamba-quant {metadata[TOOL_VERSION_KEY].value} wrote it, with its rows in the right order"
    if metadata.flag(f"{ARCHITECTURE}.rope.scaling.finetuned") is False:
        return "its rotary embedding is switched off, so the order of q and k rows cancels out"
    heads = metadata.integer(f"{ARCHITECTURE}.attention.head_count")
    head_dim = metadata.integer(f"{ARCHITECTURE}.attention.key_length", most=MOST_HEAD_DIM)
    if head_dim is None and heads:
        head_dim = (metadata.integer(f"{ARCHITECTURE}.embedding_length") or 0) // heads
    rotary_dim = metadata.integer(f"{ARCHITECTURE}.rope.dimension_count", most=MOST_HEAD_DIM)
    if rotary_dim is not None and (rotary_dim == 0 or rotary_dim % 2):
        return f"its rotary width is {rotary_dim}, which is not a positive even number"
    if not head_dim or rotary_dim is None or rotary_dim >= head_dim:
        covered = f"{rotary_dim} of {head_dim}"
        return f"its rotary embedding covers whole heads ({covered}), which llama.cpp converts correctly"
    return Rotary(head_dim, rotary_dim)


def plan_repair(file: Path) -> tuple[Checkpoint, Plan]:
    """The plan that moves q and k rows of ``file`` to where they belong and copies everything else.

    Raises ``CheckpointError`` saying why for any file that is not a partial-rotary Bamba GGUF of another tool.
    """
    checkpoint = read_gguf(file)
    rotary = needs_repair(checkpoint.key_values)
    if isinstance(rotary, str):
        raise CheckpointError(
            "this file is not one to repair",
            where=file,
            found=rotary,
            expected="a Bamba GGUF with a partial rotary embedding, written by llama.cpp's converter",
        )
    _check_attention(checkpoint, rotary)
    move = _to_right_order(rotary)
    rows: list[PlanRow] = []
    for shard, shard_file in enumerate(checkpoint.files):
        offset = 0
        for tensor in sorted((t for t in checkpoint.tensors.values() if t.file == shard_file), key=_position):
            moved = _QUERY_OR_KEY.match(tensor.name) is not None
            rows.append(
                PlanRow(
                    tensor,
                    tensor.name,
                    "",
                    move if moved else IDENTITY,
                    tensor.format,
                    tensor.shape,
                    shard=shard,
                    offset=offset,
                )
            )
            offset += padded_size(rows[-1].n_bytes)
    dropped = (Keys.General.ALIGNMENT, "split.")
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(dropped)}
    metadata |= tool_version_key()
    metadata["bamba_quant.repaired"] = string(
        f"q and k rows reordered for rotary {rotary.rotary_dim}/{rotary.head_dim}"
    )
    return checkpoint, Plan("bamba", "", tuple(rows), metadata, shard_count=len(checkpoint.files))


def _check_attention(checkpoint: Checkpoint, rotary: Rotary) -> None:
    """Every attention layer must have its q and k under their usual names, in whole heads, or nothing is touched."""
    key = f"{ARCHITECTURE}.attention.head_count_kv"
    heads = checkpoint.key_values.integers(key) if checkpoint.key_values.is_array(key) else None
    layers = [i for i, count in enumerate(heads or ()) if count]
    if not layers:
        raise CheckpointError(
            "the file does not say which layers are attention",
            where=checkpoint.path,
            found=f"{key} = {checkpoint.metadata[key].value}" if key in checkpoint.metadata else f"no {key}",
            expected="an array with the key-value heads of each layer",
        )
    for name in (f"blk.{i}.attn_{kind}.weight" for i in layers for kind in "qk"):
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.rows % rotary.head_dim:
            raise CheckpointError(
                "an attention layer's query or key is not where it should be, so nothing was moved",
                where=f"{checkpoint.path}, tensor {name}",
                found="missing" if tensor is None else f"{tensor.rows} rows",
                expected=f"a multiple of the head size, {rotary.head_dim}, rows",
            )


def _to_right_order(rotary: Rotary) -> Transform:
    faulty = interleaved_order(rotary.head_dim, rotary.head_dim)
    right = interleaved_order(rotary.head_dim, rotary.rotary_dim)
    return permuted_rows(
        f"rotary {rotary.head_dim} → {rotary.rotary_dim}/{rotary.head_dim}", np.argsort(faulty)[right]
    )


def _position(tensor: StoredTensor) -> int:
    return tensor.offset
