"""Lays a plan out as a GGUF file, or as the standard shards of one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gguf import Keys

from bamba_quant.checkpoint.gguf_file import FINGERPRINT_KEY, UNKNOWN_FINGERPRINT
from bamba_quant.checkpoint.gguf_header import DEFAULT_ALIGNMENT, MAGIC, padded_size
from bamba_quant.checkpoint.gguf_values import GgufValue, int32, pack_string, pack_value, string, uint16
from bamba_quant.planning.plan import Part, Plan, PlanRow, Shard, place, shard_numbers

_VERSION = 3


def gguf_part(row: PlanRow, name: str) -> PlanRow:
    """``row`` as the GGUF tensor ``name``, which is not placed yet."""
    part = Part(name, row.format.name, row.shape, row.n_bytes)
    return replace(row, parts=(part,))


def lay_out_gguf(plan: Plan, split_max_bytes: int | None = None, shards: Sequence[int] | None = None) -> Plan:
    """``plan`` with its tensors placed in the order of its rows, and with the headers of its files.

    The file is split into shards of at most ``split_max_bytes`` of weights, or as ``shards`` says: a number for each
    row. By default it is not split.
    """
    groups = [row.parts for row in plan.rows]
    numbers = shard_numbers(groups, split_max_bytes, DEFAULT_ALIGNMENT) if shards is None else shards
    placed = place(groups, numbers, DEFAULT_ALIGNMENT)
    rows = tuple(replace(row, parts=parts) for row, parts in zip(plan.rows, placed, strict=True))
    count = max(numbers, default=0) + 1
    files: list[Shard] = []
    for number in range(count):
        held = [row for row, shard in zip(rows, numbers, strict=True) if shard == number]
        header = _header(_shard_metadata(plan, number, count), held)
        n_bytes = len(header) + sum(padded_size(row.n_bytes) for row in held)
        files.append(Shard("", header, tuple(row.parts[0] for row in held), n_bytes))
    return replace(plan, rows=rows, shards=tuple(files))


def with_key_values(plan: Plan, metadata: Mapping[str, GgufValue]) -> Plan:
    """``plan`` with other key-values in its headers and the same tensors in each shard."""
    return lay_out_gguf(replace(plan, metadata=metadata), shards=[row.parts[0].shard for row in plan.rows])


def _shard_metadata(plan: Plan, number: int, count: int) -> Mapping[str, GgufValue]:
    """The first shard has the model's key-values; every shard has its number (llama.cpp's gguf-split)."""
    metadata = {
        key: value for key, value in plan.metadata.items() if key != FINGERPRINT_KEY
    }  # that of the input
    if count == 1:
        return metadata
    split = {
        Keys.Split.LLM_KV_SPLIT_NO: uint16(number),
        Keys.Split.LLM_KV_SPLIT_COUNT: uint16(count),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: int32(len(plan.rows)),
        FINGERPRINT_KEY: string(UNKNOWN_FINGERPRINT),
    }
    return {**metadata, **split} if number == 0 else split


def _header(metadata: Mapping[str, GgufValue], rows: Sequence[PlanRow]) -> bytes:
    chunks = [MAGIC, struct.pack("<IQQ", _VERSION, len(rows), len(metadata))]
    for key, value in metadata.items():
        chunks += (pack_string(key), pack_value(value))
    for row in rows:
        part = row.parts[0]
        # GGUF counts the contiguous axis first.
        dimensions = struct.pack(f"<{len(part.shape)}Q", *reversed(part.shape))
        chunks += (
            pack_string(part.name),
            struct.pack("<I", len(part.shape)),
            dimensions,
            struct.pack("<IQ", row.format.ggml_type, part.offset),
        )
    header = b"".join(chunks)
    return header.ljust(padded_size(len(header)), b"\0")
