"""Executes a plan into a model directory: safetensors shards with their index, and the small files beside them.

Layout: https://github.com/huggingface/safetensors#format. The byte of every weight is known before the first one is
read.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bamba_quant.checkpoint import RawReader
from bamba_quant.errors import CheckpointError
from bamba_quant.formats.base import F32, U8, Quantize
from bamba_quant.plan import PlanRow
from bamba_quant.writers.directory import atomic_directory
from bamba_quant.writers.gguf import default_threads
from bamba_quant.writers.stream import CHUNK_BYTES, Chunk, Progress, chunks_of, run_chunks, write_at

INDEX = "model.safetensors.index.json"
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its header's bytes, the tensors behind it, and its size."""

    name: str
    header: bytes
    rows: tuple[PlanRow, ...]
    n_bytes: int


def place(rows: Sequence[PlanRow], max_bytes: int | None) -> tuple[PlanRow, ...]:
    """Give every row its shard and its offset behind the header, without gaps, as the format wants.

    Sections of one tensor share its offset. A shard is closed before the tensor that would overfill it. Wider
    dtypes come first in it, so that every number is aligned.
    """
    tensors: dict[str, list[PlanRow]] = {}
    for row in rows:
        tensors.setdefault(row.name, []).append(row)
    shards: list[list[list[PlanRow]]] = [[]]
    filled = 0
    for sections in tensors.values():
        n_bytes = sum(row.n_bytes for row in sections)
        if max_bytes is not None and filled and filled + n_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(sections)
        filled += n_bytes
    placed: list[PlanRow] = []
    for number, shard in enumerate(shards):
        offset = 0
        for sections in sorted(shard, key=lambda sections: -sections[0].format.block_bytes):
            placed += (replace(row, shard=number, offset=offset) for row in sections)
            offset += sum(row.n_bytes for row in sections)
    return tuple(placed)


def layout(rows: Sequence[PlanRow]) -> tuple[Shard, ...]:
    """The files that hold ``rows``, headers packed."""
    count = max((row.shard for row in rows), default=0) + 1
    shards: list[Shard] = []
    for number in range(count):
        held = tuple(row for row in rows if row.shard == number)
        name = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        header = _header(held)
        shards.append(Shard(name, header, held, len(header) + sum(row.n_bytes for row in held)))
    return tuple(shards)


def index_file(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its name; none for a single shard."""
    if len(shards) == 1:
        return {}
    weight_map = {row.name: shard.name for shard in shards for row in shard.rows}
    total = sum(row.n_bytes for shard in shards for row in shard.rows)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def write_directory(
    rows: Sequence[PlanRow],
    files: Mapping[str, bytes],
    directory: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda n_bytes: None,
) -> tuple[Path, ...]:
    """Write placed ``rows`` and small ``files`` by name into ``directory``; return the files, weights first.

    ``progress`` is told input bytes as they are done with. Raises ``OutputError`` for the output's sake,
    ``CheckpointError`` and ``FormatError`` for a weight's; then nothing has appeared.
    """
    shards = layout(rows)
    small = {**index_file(shards), **files}
    n_bytes = sum(shard.n_bytes for shard in shards) + sum(map(len, small.values()))
    with (
        atomic_directory(directory, overwrite=overwrite, n_bytes=n_bytes) as partial,
        RawReader() as reader,
        ExitStack() as opened,
    ):
        descriptors: list[int] = []
        for shard in shards:
            descriptors.append(_reserve(partial / shard.name, shard.n_bytes))
            opened.callback(os.close, descriptors[-1])
            write_at(descriptors[-1], 0, shard.header)
        for name, content in small.items():
            descriptor = _reserve(partial / name, len(content))
            opened.callback(os.close, descriptor)
            descriptors.append(descriptor)
            write_at(descriptor, 0, content)
        chunks = (
            chunk
            for shard, descriptor in zip(shards, descriptors, strict=False)
            for row in shard.rows
            for chunk in _chunks(row, descriptor, len(shard.header))
        )
        run_chunks(chunks, reader, threads or default_threads(), progress)
        for descriptor in descriptors:
            os.fsync(descriptor)
    return tuple(directory / name for name in (*(shard.name for shard in shards), *small))


def _chunks(row: PlanRow, descriptor: int, header_bytes: int) -> Iterator[Chunk]:
    # Chunks are counted in packed bytes, and a packed weight grows to a float32 on its way.
    packed = row.source.format
    chunk_bytes = CHUNK_BYTES * packed.block_bytes // (4 * packed.block_size)
    return chunks_of(row, _finite(row), descriptor, header_bytes + row.offset, max(1, chunk_bytes))


def _finite(row: PlanRow) -> Quantize:
    """The row's format behind a check: packed blocks and transforms can make what no plain weight was."""

    def quantize(x: F32, importance: F32 | None = None) -> U8:
        if not np.isfinite(x).all():
            raise CheckpointError(
                "a weight is not a finite number once it is unpacked",
                where=f"{row.source.file}, tensor {row.source.name}",
                found=f"{x[~np.isfinite(x)][0]}",
                expected="finite values",
                fix="the file is damaged: fetch or make it again",
            )
        return row.format.quantize(x, importance)

    return quantize


def _header(rows: Sequence[PlanRow]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for row in rows:
        entries[row.name] = {
            "dtype": DTYPES[row.format.name],
            "shape": row.whole_shape,
            "data_offsets": (row.offset, row.offset + math.prod(row.whole_shape) * row.format.block_bytes),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(file: Path, size: int) -> int:
    """A descriptor of a new file with its blocks reserved where the system can, so a full disk shows early."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(descriptor, size)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(descriptor)
            raise
    return descriptor
