"""Writes importance matrices as llama-imatrix does: GGUF (``save_imatrix``), or the older .dat.

Source: llama.cpp, tools/imatrix/imatrix.cpp. The GGUF also holds Σ a as ``in_sum``, which llama.cpp's loader ignores.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, Keys
from numpy.typing import NDArray

from bamba_quant.checkpoint.activation_sums import MOST_CHUNKS, ActivationSums, TensorSums
from bamba_quant.checkpoint.gguf_header import MAGIC, padded_size
from bamba_quant.checkpoint.gguf_values import GgufValue, array, pack_string, pack_value, string, uint32
from bamba_quant.checkpoint.imatrix import CHUNK_COUNT, CHUNK_SIZE, DATASETS, PARTS
from bamba_quant.errors import FormatError, OutputError
from bamba_quant.writers.atomic import atomic_files, check_target
from bamba_quant.writers.stream import write_at

_VERSION = 3
Array = NDArray[np.float32]


def write_imatrix(
    sums: ActivationSums, file: Path, *, overwrite: bool = False, inputs: Collection[Path] = ()
) -> None:
    """Write ``sums`` to ``file``: the older form where its name ends in .dat, else GGUF.

    The older form has no place for counts by expert: each expert's mean is stored, ones for those that no token
    reached, and entries without any data are left out. Raises ``OutputError`` as ``atomic_files`` does, and
    ``FormatError`` for sums that float32 cannot hold.
    """
    raw = _dat(sums) if file.suffix == ".dat" else _gguf(sums)
    with atomic_files([(file, len(raw))], overwrite=overwrite, inputs=inputs) as (descriptor,):
        write_at(descriptor, 0, raw)


def check_imatrix_target(file: Path, *, overwrite: bool, inputs: Collection[Path]) -> None:
    """Raise ``OutputError`` where ``write_imatrix`` would, before the work is done."""
    check_target(file, overwrite, inputs)
    if not file.parent.is_dir():
        raise OutputError(
            "the directory of the output does not exist", where=file.parent, fix="create it first"
        )


def _gguf(sums: ActivationSums) -> bytes:
    metadata: dict[str, GgufValue] = {
        Keys.General.TYPE: string("imatrix"),
        DATASETS: array(GGUFValueType.STRING, sums.datasets),
        CHUNK_COUNT: uint32(sums.chunks),
        CHUNK_SIZE: uint32(sums.chunk_size),
    }
    tensors = {
        f"{name}.{part}": values
        for name, entry in sorted(sums.entries.items())
        for part, values in zip(PARTS, _arrays(name, entry), strict=False)
    }
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += (pack_string(key), pack_value(value))
    offset = 0
    for name, values in tensors.items():
        matrices, columns = values.shape
        parts += (
            pack_string(name),
            struct.pack("<IQQIQ", 2, columns, matrices, GGMLQuantizationType.F32, offset),
        )
        offset += padded_size(values.nbytes)
    header = b"".join(parts)
    return header.ljust(padded_size(len(header)), b"\0") + b"".join(
        values.tobytes().ljust(padded_size(values.nbytes), b"\0") for values in tensors.values()
    )


def _arrays(name: str, entry: TensorSums) -> list[Array]:
    """In the order of ``PARTS``, each (matrices, …), float32 little-endian."""
    found = [entry.squares, entry.counts[:, None]] + ([] if entry.sums is None else [entry.sums])
    with np.errstate(over="ignore"):
        arrays = [values.astype("<f4") for values in found]
    if not all(np.isfinite(values).all() for values in arrays):
        raise FormatError(
            "the sums of an importance matrix do not fit the file's float32",
            where=f"tensor {name}",
            fix="measure over fewer tokens, or write a .dat, which holds means",
        )
    return arrays


def _dat(sums: ActivationSums) -> bytes:
    entries = {name: entry for name, entry in sorted(sums.entries.items()) if entry.counts.any()}
    parts = [struct.pack("<i", len(entries))]
    for name, entry in entries.items():
        calls = min(-(-int(entry.counts.max()) // sums.chunk_size), MOST_CHUNKS)
        values = (entry.mean_squares() * np.float32(calls)).astype("<f4")
        text = name.encode("utf-8", "surrogateescape")
        parts += (
            struct.pack("<i", len(text)),
            text,
            struct.pack("<ii", calls, values.size),
            values.tobytes(),
        )
    dataset = "".join(sums.datasets[-1:]).encode("utf-8", "surrogateescape")
    return b"".join((*parts, struct.pack("<ii", sums.chunks, len(dataset)), dataset))
