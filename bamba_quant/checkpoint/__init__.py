"""What is on disk, read lazily and through one interface: Hugging Face directories and GGUF files."""

from contextlib import suppress
from pathlib import Path

from bamba_quant.checkpoint.base import (
    Checkpoint,
    RawReader,
    ReadOptions,
    Section,
    StoredTensor,
    read_raw,
    read_tensor,
    row_runs,
)
from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.checkpoint.huggingface import read_huggingface
from bamba_quant.checkpoint.packed import PackedTensor
from bamba_quant.checkpoint.stack import StackedTensor, packed_like, stacked
from bamba_quant.errors import CheckpointError
from bamba_quant.files.reading import check_regular
from bamba_quant.hub import local_path

__all__ = [
    "Checkpoint",
    "PackedTensor",
    "RawReader",
    "ReadOptions",
    "Section",
    "StackedTensor",
    "StoredTensor",
    "open_checkpoint",
    "packed_like",
    "read_raw",
    "read_tensor",
    "row_runs",
    "stacked",
]


def open_checkpoint(
    path: str | Path,
    *,
    weights: bool = True,
    allow_quantized: bool = True,
    reading: ReadOptions = ReadOptions(),
) -> Checkpoint:
    """The model at ``path``: a Hugging Face directory, a GGUF file, or the name of one on the Hub. Reads headers only.

    Without ``weights`` a directory may lack them, and none are looked for. Raises ``CheckpointError`` when there
    is nothing, or nothing of these kinds, and, unless ``allow_quantized``, for a quantized directory.
    """
    path = local_path(path, headers=not weights)
    if path.is_dir():
        return read_huggingface(path, weights=weights, allow_quantized=allow_quantized, reading=reading)
    if path.is_file():
        return read_gguf(path)
    with suppress(OSError):
        check_regular(path)
    raise CheckpointError(
        "there is no such file or directory",
        where=path,
        expected="a Hugging Face checkpoint directory, a .gguf file, or org/name of a model on the Hub",
    )
