"""Safetensors files as data: which tensor goes into which shard at which byte, their headers and their index.

Layout: https://github.com/huggingface/safetensors#format. The byte of every weight is known before the first one is
read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bamba_quant.codecs.base import DTYPES
from bamba_quant.errors import PlanError

INDEX = "model.safetensors.index.json"
_MOST_SHARDS = 99_999  # what five digits of a name can count
_MOST_METADATA = 1 << 28  # bytes, of all headers


@dataclass(frozen=True)
class Entry:
    """A tensor of the output: ``dtype`` as safetensors names it; ``offset`` counts from behind its shard's header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header's bytes, the tensors behind it in the order they lie in, and its size."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(entry.n_bytes for entry in self.entries)


def place(groups: Sequence[Sequence[Entry]], max_bytes: int | None) -> tuple[tuple[Entry, ...], ...]:
    """``groups`` with every entry's shard and offset, without gaps, as the format wants.

    A group is never divided, and a shard is closed before the group that would overfill it. Wider dtypes come first
    in it, so that every number is aligned.
    """
    numbers: list[int] = []
    number = filled = 0
    for group in groups:
        n_bytes = sum(entry.n_bytes for entry in group)
        if max_bytes is not None and filled and filled + n_bytes > max_bytes:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += n_bytes
    placed = [[replace(e, shard=n) for e in group] for n, group in zip(numbers, groups, strict=True)]
    ends = [0] * (number + 1)
    order = sorted(
        ((g, i) for g, group in enumerate(placed) for i in range(len(group))),
        key=lambda at: -DTYPES[placed[at[0]][at[1]].dtype].itemsize,
    )
    for g, i in order:
        entry = placed[g][i]
        placed[g][i] = replace(entry, offset=ends[entry.shard])
        ends[entry.shard] += entry.n_bytes
    return tuple(map(tuple, placed))


def shards_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """The files that hold placed ``entries``, headers packed; each header carries ``metadata``.

    Raises ``PlanError`` for so many shards that their headers would fill the memory.
    """
    count = max((entry.shard for entry in entries), default=0) + 1
    repeated = count * sum(len(key) + len(value) for key, value in metadata.items())
    if count > _MOST_SHARDS or repeated > _MOST_METADATA:
        raise PlanError(
            "the weights would be split into too many shards",
            found=f"{count:,} shards, whose headers repeat {repeated:,} bytes of metadata",
            expected=f"at most {_MOST_SHARDS:,} shards and {_MOST_METADATA:,} bytes",
            fix="give a larger --max-shard-size",
        )
    held_by: list[list[Entry]] = [[] for _ in range(count)]
    for entry in entries:
        held_by[entry.shard].append(entry)
    shards: list[Shard] = []
    for number, unsorted in enumerate(held_by):
        held = sorted(unsorted, key=lambda e: (e.offset, e.n_bytes))
        name = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shards.append(Shard(name, _header(held, metadata), tuple(held)))
    return tuple(shards)


def index_file(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its name; none for a single shard."""
    if len(shards) == 1:
        return {}
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.n_bytes for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (entry.offset, entry.offset + entry.n_bytes),
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
