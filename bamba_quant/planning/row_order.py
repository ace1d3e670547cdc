"""Recognises GGUF files whose q and k rows llama.cpp's converter put in the wrong order.

The converter interleaves all rows of every head although a partial rotary embedding rotates only the first ones
(its conversion/llama.py ``permute``, called for Bamba from conversion/granite.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import Keys

from bamba_quant.checkpoint import Checkpoint
from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.errors import PlanError
from bamba_quant.families.hf_schema import MOST_HEAD_DIM
from bamba_quant.metadata.general import TOOL_VERSION_KEY

ARCHITECTURE = "granitehybrid"


@dataclass(frozen=True)
class Rotary:
    """Rows of an attention head, and how many of them the model rotates."""

    head_dim: int
    rotary_dim: int


def needs_repair(metadata: KeyValues) -> Rotary | str:
    """The rotary geometry when a GGUF's key-values say that its q and k rows are misplaced, else why they are not.

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


def check_row_order(checkpoint: Checkpoint) -> None:
    """Raise ``PlanError`` for a GGUF that needs a repair before its rows can be used."""
    if not isinstance(needs_repair(checkpoint.key_values), str):
        raise PlanError(
            "the file's q and k rows are in the wrong order, as llama.cpp's converter writes them",
            where=checkpoint.path,
            fix="repair the file first: bamba-quant repair FILE",
        )
