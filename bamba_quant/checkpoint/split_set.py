"""Shards of a split GGUF that do not belong together are an error, since each of them is a valid file.

Shards of this tool carry a mark: a digest of the headers and weights of the whole set, so shards with the same mark
are of the same set, byte for byte, wherever and whenever they were made; and a digest of the shard's own header, which
tells a mark that another tool copied into a file of its own. Shards of other tools have what llama.cpp wants of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFValueType, Keys

from bamba_quant.checkpoint.gguf_header import Cursor, Header
from bamba_quant.checkpoint.gguf_values import KeyValues, pack_string, pack_value, string
from bamba_quant.errors import CheckpointError, join_names

FINGERPRINT_KEY = "bamba_quant.split.set"
_OF_SET, _OF_SHARD = 32, 16  # hexadecimal digits
UNKNOWN_FINGERPRINT = "0" * (_OF_SET + _OF_SHARD)  # the mark of a shard until its set is known


def insert_fingerprint(header: bytes, set_digest: str) -> bytes:
    """A shard's header with its mark in place of ``UNKNOWN_FINGERPRINT``; ``set_digest`` are hexadecimal digits."""
    return header.replace(_packed(UNKNOWN_FINGERPRINT), _packed(set_digest[:_OF_SET] + _own_digest(header)))


def is_stale(cursor: Cursor, header: Header) -> bool:
    """Whether the mark in ``header``, which ``cursor`` has read, is of another file than this one."""
    mark = header.key_values[FINGERPRINT_KEY].value
    if not isinstance(mark, str) or len(mark) != len(UNKNOWN_FINGERPRINT):
        return True
    try:
        raw = cursor.before(header.data_start)
    except EOFError:
        return True
    return _own_digest(raw.replace(_packed(mark), _packed(UNKNOWN_FINGERPRINT))) != mark[_OF_SET:]


def _own_digest(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:_OF_SHARD]


def _packed(mark: str) -> bytes:
    return pack_string(FINGERPRINT_KEY) + pack_value(string(mark))


def check_split(files: Sequence[Path], key_values: Sequence[KeyValues], tensors: int) -> None:
    """Raise ``CheckpointError`` unless ``files``, all shards by their names, in order, are one set.

    ``key_values`` are those of each file; ``tensors`` counts the tensors of all.
    """
    if len(files) == 1:
        count = key_values[0].integer(Keys.Split.LLM_KV_SPLIT_COUNT, kind=GGUFValueType.UINT16)
        if count is not None and count > 1:
            raise CheckpointError(
                "the file is one shard of a split GGUF and is not named like one",
                where=files[0],
                found=f"{Keys.Split.LLM_KV_SPLIT_COUNT} = {count}",
                expected=f"NAME-00001-of-{count:05d}.gguf beside the other shards",
                fix="give the shards the names they were written under",
            )
        return
    marks = [(values.text(FINGERPRINT_KEY) or "")[:_OF_SET] for values in key_values]
    if len(set(marks)) > 1:
        common = Counter(marks).most_common(1)[0][0]
        others = [file.name for file, mark in zip(files, marks, strict=True) if mark != common]
        raise CheckpointError(
            "the shards are of different sets: files of two conversions stand side by side",
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
                    "the shards do not belong together: what one says of the split is not what is there",
                    where=file,
                    found=f"no {key}" if found is None else f"{key} = {found}",
                    expected=expected,
                    fix="put the shards of one split, under the names they were written under, in one directory",
                )
