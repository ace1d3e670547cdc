"""Plans the repair of a GGUF file whose q and k rows are in the wrong order.

A row is quantized on its own, so moving rows loses nothing in any format.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from gguf import Keys

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_file import read_gguf, split_stem
from bamba_quant.checkpoint.gguf_values import string
from bamba_quant.errors import CheckpointError
from bamba_quant.families.transforms import IDENTITY, Transform, interleaved_order, permuted_rows
from bamba_quant.metadata.general import tool_version_key
from bamba_quant.metadata.model_name import output_directory
from bamba_quant.planning.gguf_layout import gguf_part, lay_out_gguf
from bamba_quant.planning.plan import Plan, PlanRow
from bamba_quant.planning.row_order import ARCHITECTURE, Rotary, needs_repair

_QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)$")
_CONVERT_AGAIN = "convert the original checkpoint again"


def repaired_path(file: Path) -> Path:
    """Where a repaired ``file`` goes by default; of a shard, what all shards are named after."""
    return output_directory(file) / f"{split_stem(file).name}-repaired.gguf"


def plan_repair(file: Path) -> Plan:
    """The plan that moves the q and k rows of ``file`` to where they belong and copies everything else.

    Raises ``CheckpointError`` saying why for any file that is not a partial-rotary Bamba GGUF of another tool.
    """
    checkpoint = read_gguf(file)
    rotary = needs_repair(checkpoint.key_values)
    if isinstance(rotary, str):
        raise CheckpointError(
            "this file does not need a repair",
            where=file,
            found=rotary,
            expected="a Bamba GGUF with a partial rotary embedding, written by llama.cpp's converter",
        )
    _check_attention(checkpoint, rotary)
    move = _to_right_order(rotary)
    shards = {shard_file: number for number, shard_file in enumerate(checkpoint.files)}
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: (shards[tensor.file], tensor.offset))
    rows = tuple(
        gguf_part(
            PlanRow(
                tensor,
                role="",
                codec=tensor.format,
                shape=tensor.shape,
                parts=(),
                transform=move if _QUERY_OR_KEY.match(tensor.name) else IDENTITY,
            ),
            tensor.name,
        )
        for tensor in tensors
    )
    dropped = (Keys.General.ALIGNMENT, "split.")
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(dropped)}
    metadata |= tool_version_key()
    metadata["bamba_quant.repaired"] = string(
        f"q and k rows reordered for rotary {rotary.rotary_dim}/{rotary.head_dim}"
    )
    plan = Plan(checkpoint, "bamba", "", rows, "gguf", metadata=metadata)
    return lay_out_gguf(plan, shards=[shards[tensor.file] for tensor in tensors])


def _check_attention(checkpoint: Checkpoint, rotary: Rotary) -> None:
    """Raise ``CheckpointError`` unless every attention layer has q and k under their usual names, in whole heads."""
    key = f"{ARCHITECTURE}.attention.head_count_kv"
    heads = checkpoint.key_values.integers(key) if checkpoint.key_values.is_array(key) else None
    layers = [i for i, count in enumerate(heads or ()) if count]
    if not layers:
        raise CheckpointError(
            "the file does not list its attention layers",
            where=checkpoint.path,
            found=f"{key} = {checkpoint.metadata[key].value}" if key in checkpoint.metadata else f"no {key}",
            expected="an array with the key-value heads of each layer",
            fix=_CONVERT_AGAIN,
        )
    for name in (f"blk.{i}.attn_{kind}.weight" for i in layers for kind in "qk"):
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                "the file has no query or key matrix for an attention layer, so it cannot be repaired",
                where=checkpoint.path,
                found=f"no {name}",
                fix=_CONVERT_AGAIN,
            )
        if tensor.rows % rotary.head_dim:
            raise CheckpointError(
                "the rows of a query or key matrix do not divide into heads, so the file cannot be repaired",
                where=f"{checkpoint.path}, tensor {name}",
                found=f"{tensor.rows} rows",
                expected=f"a multiple of {rotary.head_dim}",
                fix=_CONVERT_AGAIN,
            )


def _to_right_order(rotary: Rotary) -> Transform:
    faulty = interleaved_order(rotary.head_dim, rotary.head_dim)
    right = interleaved_order(rotary.head_dim, rotary.rotary_dim)
    return permuted_rows(
        f"rotary {rotary.head_dim} → {rotary.rotary_dim}/{rotary.head_dim}", np.argsort(faulty)[right]
    )
