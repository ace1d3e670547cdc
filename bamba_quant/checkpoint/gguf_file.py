"""A GGUF file's key-values and tensors, without reading a weight; the shards of a split file are read as one.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

Shards of this tool carry a fingerprint: a digest of the headers and weights of the whole set, so shards with the same
digest are of the same set, byte for byte; and a digest of the shard's own header, which detects a fingerprint that
another tool copied into a file of its own. Shards of other tools are checked by the split keys of llama.cpp.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFValueType, Keys

from bamba_quant.checkpoint.base import Checkpoint, StoredTensor
from bamba_quant.checkpoint.gguf_header import MAGIC, Cursor, Header, read_header
from bamba_quant.checkpoint.gguf_values import KeyValues, pack_string, pack_value, string
from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.codecs.codebooks import listed_format
from bamba_quant.errors import CheckpointError, FormatError, join_names
from bamba_quant.files.reading import opened

_MOST_NAMED = 5
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf(file: Path) -> Checkpoint:
    """The model in ``file``, or in all shards of the split that ``file`` belongs to.

    Key-values are those of the first shard, as llama.cpp reads them. Raises ``CheckpointError`` for a file that
    llama.cpp would not load: not a GGUF, malformed, truncated, or of an incomplete or inconsistent split.
    """
    shards = split_files(file)
    key_values: list[KeyValues] = []
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        values, found = _read_shard(shard)
        key_values.append(values)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                "two shards of a split GGUF hold the same tensor",
                where=shard,
                found=f"{join_names(twice)}, also in {tensors[twice[0]].file.name}",
                fix="fetch all shards of one version",
            )
        tensors |= found
    check_split(shards, key_values, len(tensors))
    return Checkpoint(file, "gguf", key_values[0], tensors, shards)


def split_files(file: Path) -> tuple[Path, ...]:
    """All shards of the split ``file`` belongs to, in order; ``file`` alone when it is not split."""
    match = _SPLIT_NAME.match(file.name)
    if match is None:
        return (file,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise CheckpointError(
            "the name of a split GGUF's shard is invalid",
            where=file,
            found=f"shard {number} of {count}",
            expected=f"a number from 1 to {count}" if count else "a count of at least 1",
            fix="give the file the name it was published under",
        )
    shards: list[Path] = []
    missing: list[str] = []
    for each in range(count):
        shards.append(split_name(file.parent / match["stem"], each, count))
        if not shards[-1].is_file():
            missing.append(shards[-1].name)
        if len(missing) == _MOST_NAMED:  # the count in a file's name may be 99,999
            break
    if missing:
        raise CheckpointError(
            "shards of a split GGUF are missing",
            where=file.parent,
            found=join_names(missing, _MOST_NAMED) + (", …" if len(shards) < count else "") + " missing",
            fix="put all shards in one directory",
        )
    return tuple(shards)


def split_stem(file: Path) -> Path:
    """``file`` without .gguf and without the numbers of a split: what all shards' names begin with."""
    match = _SPLIT_NAME.match(file.name)
    return file.with_name(match["stem"] if match else file.name.removesuffix(".gguf"))


def split_name(stem: Path, number: int, count: int) -> Path:
    """llama.cpp's name for shard ``number`` (from 0) of ``count``."""
    return stem.with_name(f"{stem.name}-{number + 1:05d}-of-{count:05d}.gguf")


def other_splits(files: Sequence[Path]) -> list[str]:
    """Names of shards in the directory of ``files``, all shards of a GGUF, with its stem and another count."""
    beside = files[0].parent.glob("*-of-*.gguf")
    return sorted(
        each.name for each in beside if each not in files and split_stem(each) == split_stem(files[0])
    )


def _read_shard(file: Path) -> tuple[KeyValues, dict[str, StoredTensor]]:
    with opened(file) as (stream, size):
        cursor = Cursor(stream, size)
        header = _header(file, cursor, size)
        if FINGERPRINT_KEY in header.key_values and _is_stale(cursor, header):
            del header.key_values[FINGERPRINT_KEY]
    return KeyValues(header.key_values, file), _tensors(file, header, size)


def _header(file: Path, cursor: Cursor, size: int) -> Header:
    try:
        if size < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
            raise CheckpointError(
                "the file is not a GGUF file",
                where=file,
                expected="a file that begins with the bytes GGUF",
            )
        return read_header(cursor)
    except EOFError:
        raise CheckpointError(
            "the GGUF file ends inside its header",
            where=f"{file}, byte {cursor.position}",
            found=f"{size} bytes",
            fix="fetch the file again",
        ) from None
    except ValueError as error:
        raise CheckpointError(
            "the GGUF header is malformed",
            where=f"{file}, byte {cursor.position}",
            found=str(error),
            fix="fetch the file again, or convert the original checkpoint again",
        ) from None


def _tensors(file: Path, header: Header, size: int) -> dict[str, StoredTensor]:
    """The tensors of one file, which must be contiguous, each padded to the alignment."""
    known = {codec.ggml_type: codec for codec in codecs(BlockCodec)}
    tensors: dict[str, StoredTensor] = {}
    position, before = 0, "the header"
    for entry in header.tensors:
        where = f"{file}, tensor {entry.name}"
        try:
            codec = known.get(entry.ggml_type) or listed_format(entry.ggml_type)
            tensor = StoredTensor(entry.name, entry.shape, codec, file, header.data_start + entry.offset)
            n_bytes = tensor.n_bytes
        except FormatError as error:
            raise CheckpointError(
                error.what, where=where, found=error.found, expected=error.expected
            ) from None
        if entry.offset != position:
            raise CheckpointError(
                "the tensors of a GGUF file overlap, leave a gap or are not aligned",
                where=where,
                found=f"offset {entry.offset}",
                expected=f"{position}, the first multiple of {header.alignment} after {before}",
                fix="fetch the file again, or convert the original checkpoint again",
            )
        if tensor.offset + n_bytes > size:
            raise CheckpointError(
                "the GGUF file is truncated",
                where=where,
                found=f"{size} bytes",
                expected=f"at least {tensor.offset + n_bytes}",
                fix="fetch the file again",
            )
        position += -(-n_bytes // header.alignment) * header.alignment
        before = entry.name
        tensors[entry.name] = tensor
    return tensors


FINGERPRINT_KEY = "bamba_quant.split.set"
_OF_SET, _OF_SHARD = 32, 16  # hexadecimal digits
UNKNOWN_FINGERPRINT = "0" * (_OF_SET + _OF_SHARD)  # the fingerprint of a shard until its set is known


def insert_fingerprint(header: bytes, set_digest: str) -> bytes:
    """A shard's header with its fingerprint instead of ``UNKNOWN_FINGERPRINT``; ``set_digest`` is hexadecimal."""
    return header.replace(
        _kv_bytes(UNKNOWN_FINGERPRINT),
        _kv_bytes(set_digest[:_OF_SET] + _own_digest(header)),
    )


def _is_stale(cursor: Cursor, header: Header) -> bool:
    """Whether the fingerprint in ``header``, which ``cursor`` has read, was made for another file."""
    fingerprint = header.key_values[FINGERPRINT_KEY].value
    if not isinstance(fingerprint, str) or len(fingerprint) != len(UNKNOWN_FINGERPRINT):
        return True
    try:
        raw = cursor.first_bytes(header.data_start)
    except EOFError:
        return True
    return (
        _own_digest(raw.replace(_kv_bytes(fingerprint), _kv_bytes(UNKNOWN_FINGERPRINT)))
        != fingerprint[_OF_SET:]
    )


def _own_digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:_OF_SHARD]


def _kv_bytes(fingerprint: str) -> bytes:
    return pack_string(FINGERPRINT_KEY) + pack_value(string(fingerprint))


def check_split(files: Sequence[Path], key_values: Sequence[KeyValues], tensors: int) -> None:
    """Raise ``CheckpointError`` unless ``files``, all shards by name and in order, belong to one set.

    ``key_values`` are those of each file; ``tensors`` counts the tensors of all.
    """
    if len(files) == 1:
        count = key_values[0].integer(Keys.Split.LLM_KV_SPLIT_COUNT, kind=GGUFValueType.UINT16)
        if count is not None and count > 1:
            raise CheckpointError(
                "the file is a shard of a split GGUF, but does not have a shard's name",
                where=files[0],
                found=f"{Keys.Split.LLM_KV_SPLIT_COUNT} = {count}",
                expected=f"NAME-00001-of-{count:05d}.gguf beside the other shards",
                fix="give the shards the names they were written under",
            )
        return
    digests = [(values.text(FINGERPRINT_KEY) or "")[:_OF_SET] for values in key_values]
    if len(set(digests)) > 1:
        common = Counter(digests).most_common(1)[0][0]
        others = [
            file.name for file, fingerprint in zip(files, digests, strict=True) if fingerprint != common
        ]
        raise CheckpointError(
            "the shards belong to different sets: the directory has files of two conversions",
            where=files[0].parent,
            found=f"another {FINGERPRINT_KEY} than in the other shards, or none: {join_names(others)}",
            expected="shards of one conversion",
            fix="if a run that replaced them was interrupted, run it again; else fetch or write the whole set again",
        )
    for number, (file, values) in enumerate(zip(files, key_values, strict=True)):
        for key, kind, expected, required in (
            (Keys.Split.LLM_KV_SPLIT_NO, GGUFValueType.UINT16, number, True),
            (Keys.Split.LLM_KV_SPLIT_COUNT, GGUFValueType.UINT16, len(files), number == 0),
            (Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, GGUFValueType.INT32, tensors, number == 0),
        ):
            found = values.integer(key, kind=kind)
            if found != expected and (found is not None or required):
                raise CheckpointError(
                    "the shards do not belong together: the split keys of one do not match the files",
                    where=file,
                    found=f"no {key}" if found is None else f"{key} = {found}",
                    expected=expected,
                    fix="put the shards of one split, under the names they were written under, in one directory",
                )
