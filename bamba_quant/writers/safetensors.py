"""Executes a plan of plain tensors into a model directory: safetensors shards, their index, and the small files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from bamba_quant.checkpoint import RawReader
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import Quantize
from bamba_quant.errors import CheckpointError
from bamba_quant.planning.plan import PlanRow
from bamba_quant.writers.directory import reserve
from bamba_quant.writers.gguf import default_threads
from bamba_quant.writers.resumable import resumable_directory
from bamba_quant.writers.shards import Entry, Shard, index_file, shards_of
from bamba_quant.writers.shards import place as place_entries
from bamba_quant.writers.stream import CHUNK_BYTES, Chunk, chunks_of, run_chunks, write_at
from bamba_quant.writers.tasks import Progress

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def entry_of(row: PlanRow) -> Entry:
    """The tensor that a row becomes, or a section of."""
    return Entry(row.name, DTYPES[row.format.name], row.whole_shape, row.shard, row.offset)


def place(rows: Sequence[PlanRow], max_bytes: int | None) -> tuple[PlanRow, ...]:
    """``rows`` with shard and offset, in the order they lie in; ``writers.shards.place`` says where that is.

    Sections of one tensor share its offset.
    """
    entries = {row.name: entry_of(row) for row in rows}
    placed = {entry.name: entry for (entry,) in place_entries([[e] for e in entries.values()], max_bytes)}
    moved = [replace(row, shard=placed[row.name].shard, offset=placed[row.name].offset) for row in rows]
    return tuple(sorted(moved, key=lambda row: (row.shard, row.offset)))


def layout(rows: Sequence[PlanRow]) -> tuple[Shard, ...]:
    """The files that hold ``rows``, headers packed."""
    entries = {row.name: entry_of(row) for row in rows}
    return shards_of(list(entries.values()), {"format": "pt"})


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
    inputs = {file for row in rows for file in row.source.files}
    with (
        resumable_directory(
            directory, None, inputs=inputs, overwrite=overwrite, resume=False, n_bytes=n_bytes
        ) as (partial, _),
        RawReader() as reader,
        ExitStack() as opened,
    ):
        descriptors: list[int] = []
        for shard in shards:
            descriptors.append(reserve(partial / shard.name, shard.n_bytes))
            opened.callback(os.close, descriptors[-1])
            write_at(descriptors[-1], 0, shard.header)
        for name, content in small.items():
            descriptor = reserve(partial / name, len(content))
            opened.callback(os.close, descriptor)
            descriptors.append(descriptor)
            write_at(descriptor, 0, content)
        chunks = (
            chunk
            for row in rows
            for chunk in row_chunks(row, descriptors[row.shard], len(shards[row.shard].header))
        )
        run_chunks(chunks, reader, threads or default_threads(), progress)
        for descriptor in descriptors:
            os.fsync(descriptor)
    return tuple(directory / name for name in (*(shard.name for shard in shards), *small))


def row_chunks(row: PlanRow, descriptor: int, header_bytes: int) -> Iterator[Chunk]:
    """The chunks of a placed row, with a check that what they write is finite."""
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
