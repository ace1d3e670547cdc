"""A GGUF file's key-values and tensors, without reading a weight; a split file's shards are read as one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType, Keys

from bamba_quant.checkpoint.base import Checkpoint, StoredTensor
from bamba_quant.checkpoint.gguf_values import Cursor, Value
from bamba_quant.checkpoint.split_set import check_split
from bamba_quant.errors import CheckpointError
from bamba_quant.formats import Format, formats

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf(file: Path) -> Checkpoint:
    """The model in ``file``, or in all shards of the split that ``file`` belongs to.

    Key-values are those of the first shard, as llama.cpp reads them. Raises ``CheckpointError`` for a file that
    is no GGUF, is truncated, or whose split is incomplete.
    """
    shards = split_files(file)
    key_values: list[dict[str, Value]] = []
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        values, found = _read_shard(shard)
        key_values.append(values)
        tensors |= found
    check_split(shards, key_values, len(tensors))
    return Checkpoint(file, "gguf", key_values[0], tensors, shards)


def split_files(file: Path) -> tuple[Path, ...]:
    """All shards of the split ``file`` belongs to, in order; ``file`` alone when it is not split."""
    match = _SPLIT_NAME.match(file.name)
    if match is None:
        return (file,)
    shards = tuple(
        split_name(file.parent / match["stem"], number, int(match["count"]))
        for number in range(int(match["count"]))
    )
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            "shards of a split GGUF are missing",
            where=file.parent,
            found=", ".join(missing),
            fix="put all shards in one directory",
        )
    return shards


def split_stem(file: Path) -> Path:
    """``file`` without .gguf and without the numbers of a split: what all shards' names begin with."""
    match = _SPLIT_NAME.match(file.name)
    return file.with_name(match["stem"] if match else file.name.removesuffix(".gguf"))


def split_name(stem: Path, number: int, count: int) -> Path:
    """llama.cpp's name for shard ``number`` (from 0) of ``count``."""
    return stem.with_name(f"{stem.name}-{number + 1:05d}-of-{count:05d}.gguf")


def _read_shard(file: Path) -> tuple[dict[str, Value], dict[str, StoredTensor]]:
    try:
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise CheckpointError("not a GGUF file", where=file, expected="a file that begins with GGUF")
            with (
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as buffer,
            ):
                return _parse(file, buffer)
    except OSError as error:
        raise CheckpointError("a GGUF file cannot be read", where=file, found=error.strerror) from error


def _parse(file: Path, buffer: memoryview) -> tuple[dict[str, Value], dict[str, StoredTensor]]:
    cursor = Cursor(buffer)
    cursor.take(len(MAGIC))
    try:
        version = cursor.number(GGUFValueType.UINT32)
        if version not in (2, 3):
            raise CheckpointError(
                "a GGUF version that is not known",
                where=file,
                found=version,
                expected="2 or 3",
                fix="a big-endian or a version-1 file must be converted again",
            )
        tensor_count = cursor.number(GGUFValueType.UINT64)
        value_count = cursor.number(GGUFValueType.UINT64)
        key_values = {cursor.text(): cursor.value() for _ in range(value_count)}
        entries = [_entry(file, cursor) for _ in range(tensor_count)]
    except EOFError:
        raise CheckpointError(
            "a GGUF file ends inside its header",
            where=file,
            found=f"{len(buffer)} bytes",
            fix="fetch the file again",
        ) from None
    except ValueError as error:
        raise CheckpointError(
            "a GGUF header is malformed", where=f"{file}, byte {cursor.position}", found=str(error)
        ) from error
    alignment = DEFAULT_ALIGNMENT
    if Keys.General.ALIGNMENT in key_values:
        alignment = int(key_values[Keys.General.ALIGNMENT].value)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: StoredTensor(name, shape, number_format, file, data_start + offset)
        for name, shape, number_format, offset in entries
    }
    end = max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=0)
    if end > len(buffer):
        raise CheckpointError(
            "a GGUF file is truncated",
            where=file,
            found=f"{len(buffer)} bytes",
            expected=f"at least {end}",
            fix="fetch the file again",
        )
    return key_values, tensors


def _format_of(ggml_type: GGMLQuantizationType) -> Format:
    return next(known for known in formats() if known.ggml_type == ggml_type)


def _entry(file: Path, cursor: Cursor) -> tuple[str, tuple[int, ...], Format, int]:
    name = cursor.text()
    dimensions = [cursor.number(GGUFValueType.UINT64) for _ in range(cursor.number(GGUFValueType.UINT32))]
    number_format = _format_of(GGMLQuantizationType(cursor.number(GGUFValueType.UINT32)))
    # GGUF counts the contiguous axis first.
    return name, tuple(reversed(dimensions)), number_format, cursor.number(GGUFValueType.UINT64)
