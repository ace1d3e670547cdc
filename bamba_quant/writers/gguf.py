"""Executes a plan into a GGUF file, or into the standard shards of one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Where every byte
goes is known before the first weight is read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import Keys

from bamba_quant.checkpoint import RawReader
from bamba_quant.checkpoint.gguf_file import (
    FINGERPRINT_KEY,
    UNKNOWN_FINGERPRINT,
    insert_fingerprint,
    split_name,
    split_stem,
)
from bamba_quant.checkpoint.gguf_header import MAGIC, padded_size
from bamba_quant.checkpoint.gguf_values import GgufValue, int32, pack_string, pack_value, string, uint16
from bamba_quant.errors import PlanError
from bamba_quant.planning.plan import Plan, PlanRow
from bamba_quant.writers.atomic import atomic_files
from bamba_quant.writers.checksum import Checksum
from bamba_quant.writers.stream import check_equal, chunks_of, quantizers, run_chunks, write_at
from bamba_quant.writers.tasks import Progress

_VERSION = 3


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, the tensors behind it, and its size."""

    file: Path
    header: bytes
    rows: tuple[PlanRow, ...]
    n_bytes: int


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def layout(plan: Plan, outfile: Path) -> tuple[Shard, ...]:
    """The files ``plan`` makes under the name ``outfile``, headers packed."""
    shards: list[Shard] = []
    for number in range(plan.shard_count):
        rows = tuple(row for row in plan.rows if row.shard == number)
        header = _header(_shard_metadata(plan, number), rows)
        file = outfile
        if plan.shard_count > 1:
            file = split_name(split_stem(outfile), number, plan.shard_count)
        shards.append(Shard(file, header, rows, len(header) + plan.shard_bytes(number)))
    return tuple(shards)


def write_gguf(
    plan: Plan,
    outfile: Path,
    *,
    threads: int | None = None,
    compiled: bool = True,
    overwrite: bool = False,
    replace_input: bool = False,
    inputs: Collection[Path] = (),
    progress: Progress = lambda n_bytes: None,
) -> tuple[Path, ...]:
    """Write ``plan`` and return the files, in order.

    With ``compiled=False`` numpy quantizes, which is slower and gives the same bytes. ``replace_input`` allows
    ``overwrite`` to replace a file that the plan reads; ``inputs`` are other files that must stay. ``progress`` is
    told input bytes as they are done with. Raises ``OutputError`` for the output's sake, ``CheckpointError`` and
    ``FormatError`` for a weight's; then no file has appeared.
    """
    if plan.config_only:
        raise PlanError("there are no weights to convert", where=plan.rows[0].source.file)
    shards = layout(plan, outfile)
    targets = [(shard.file, shard.n_bytes) for shard in shards]
    read = () if replace_input else {file for row in plan.rows for file in row.source.files}
    with atomic_files(targets, overwrite=overwrite, inputs={*read, *inputs}) as outputs:
        fill(plan, shards, outputs, threads=threads, compiled=compiled, progress=progress)
    return tuple(shard.file for shard in shards)


def fill(
    plan: Plan,
    shards: Sequence[Shard],
    outputs: Sequence[int],
    *,
    threads: int | None,
    compiled: bool,
    progress: Progress,
) -> None:
    """Write ``shards``, the layout of ``plan``, to the descriptors ``outputs``; arguments and errors as above."""
    by_format = quantizers(plan.rows, plan.refine, compiled)
    with RawReader() as reader:
        for skipped in plan.skipped:
            check_equal(skipped, reader)
        checksums = [Checksum(shard.n_bytes) if len(shards) > 1 else None for shard in shards]
        chunks = (
            replace(chunk, checksum=checksum)
            for shard, descriptor, checksum in zip(shards, outputs, checksums, strict=True)
            for row in shard.rows
            for chunk in chunks_of(
                row, by_format[row.format.name], descriptor, len(shard.header) + row.offset
            )
        )
        run_chunks(chunks, reader, threads or default_threads(), progress)
        for header, descriptor in zip(_marked(shards, checksums), outputs, strict=True):
            write_at(descriptor, 0, header)


def _marked(shards: Sequence[Shard], checksums: Sequence[Checksum | None]) -> list[bytes]:
    """The shards' headers; those of a set with its mark, a digest of all headers and weights.

    It depends on nothing else, so the same conversion gives the same bytes anywhere, and shards with the same mark
    are interchangeable.
    """
    digest = hashlib.sha256()
    for shard, checksum in zip(shards, checksums, strict=True):
        digest.update(shard.header)
        digest.update(b"" if checksum is None else checksum.value.to_bytes(4, "little"))
    return [insert_fingerprint(shard.header, digest.hexdigest()) for shard in shards]


def _shard_metadata(plan: Plan, number: int) -> Mapping[str, GgufValue]:
    """The first shard carries the model's key-values, every shard says which it is (llama.cpp's gguf-split)."""
    metadata = {key: value for key, value in plan.metadata.items() if key != FINGERPRINT_KEY}  # an input's
    if plan.shard_count == 1:
        return metadata
    split = {
        Keys.Split.LLM_KV_SPLIT_NO: uint16(number),
        Keys.Split.LLM_KV_SPLIT_COUNT: uint16(plan.shard_count),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: int32(len(plan.rows)),
        FINGERPRINT_KEY: string(UNKNOWN_FINGERPRINT),
    }
    return {**metadata, **split} if number == 0 else split


def _header(metadata: Mapping[str, GgufValue], rows: Sequence[PlanRow]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(rows), len(metadata))]
    for key, value in metadata.items():
        parts += (pack_string(key), pack_value(value))
    for row in rows:
        # GGUF counts the contiguous axis first.
        dimensions = struct.pack(f"<{len(row.shape)}Q", *reversed(row.shape))
        parts += (
            pack_string(row.name),
            struct.pack("<I", len(row.shape)),
            dimensions,
            struct.pack("<IQ", row.format.ggml_type, row.offset),
        )
    header = b"".join(parts)
    return header.ljust(padded_size(len(header)), b"\0")
