"""Lays tensors out as safetensors files with an index.

Layout: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from bamba_quant.codecs import BlockCodec
from bamba_quant.codecs.base import DTYPES
from bamba_quant.errors import PlanError
from bamba_quant.planning.plan import Group, Part, Shard, place, shard_numbers

INDEX = "model.safetensors.index.json"
_FORMAT_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_MOST_SHARDS = 99_999  # what five digits of a name can count
_MOST_METADATA = 1 << 28  # bytes, of all headers


def tensor_part(name: str, dtype: str | BlockCodec, shape: tuple[int, ...]) -> Part:
    """A tensor that is not placed yet. ``dtype`` is a safetensors dtype, or a plain number format."""
    named = _FORMAT_DTYPES[dtype.name] if isinstance(dtype, BlockCodec) else dtype
    return Part(name, named, shape, math.prod(shape) * DTYPES[named].itemsize)


def place_parts(groups: Sequence[Group], max_bytes: int | None) -> list[tuple[Part, ...]]:
    """``groups`` placed without gaps, as the format wants it; no group is divided between shards.

    Wider dtypes come first in a shard, so that every number is aligned.
    """
    shards = shard_numbers(groups, max_bytes)
    return place(groups, shards, sort_key=lambda part: -DTYPES[part.dtype].itemsize)


def pack_shards(parts: Sequence[Part], metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """The files that hold placed ``parts``; each header carries ``metadata``.

    Raises ``PlanError`` for so many shards that their headers would fill the memory.
    """
    count = max((part.shard for part in parts), default=0) + 1
    repeated = count * sum(len(key) + len(value) for key, value in metadata.items())
    if count > _MOST_SHARDS or repeated > _MOST_METADATA:
        raise PlanError(
            "the weights would be split into too many shards",
            found=f"{count:,} shards, whose headers repeat {repeated:,} bytes of metadata",
            expected=f"at most {_MOST_SHARDS:,} shards and {_MOST_METADATA:,} bytes",
            fix="give a larger --max-shard-size",
        )
    by_shard: list[list[Part]] = [[] for _ in range(count)]
    for part in parts:
        by_shard[part.shard].append(part)
    shards: list[Shard] = []
    for number, unsorted in enumerate(by_shard):
        held = tuple(sorted(unsorted, key=lambda part: (part.offset, part.n_bytes)))
        name = "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        header = _header(held, metadata)
        shards.append(Shard(name, header, held, len(header) + sum(part.n_bytes for part in held)))
    return tuple(shards)


def index_file(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its name; empty for a single shard."""
    if len(shards) == 1:
        return {}
    weight_map = {part.name: shard.name for shard in shards for part in shard.parts}
    total = sum(part.n_bytes for shard in shards for part in shard.parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _header(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    for part in parts:
        described[part.name] = {
            "dtype": part.dtype,
            "shape": part.shape,
            "data_offsets": (part.offset, part.offset + part.n_bytes),
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
