"""Shards of a split GGUF that do not belong together are an error, since each of them is a valid file.

Shards of this tool carry a mark: a digest of the headers and weights of the whole set, so shards with the same mark
are of the same set, byte for byte, wherever and whenever they were made. Those of other tools carry none, and only
what gguf-split writes about shards is compared.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import Keys

from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.errors import CheckpointError, listed

SET = "bamba_quant.split.set"


def check_split(files: Sequence[Path], key_values: Sequence[Mapping[str, Value]], tensors: int) -> None:
    """Raise ``CheckpointError`` unless ``files``, all shards by their names, in order, are one set.

    ``key_values`` are those of each file; ``tensors`` counts the tensors of all.
    """
    if len(files) == 1:
        count = _plain(key_values[0], Keys.Split.LLM_KV_SPLIT_COUNT)
        if isinstance(count, int) and count > 1:
            raise CheckpointError(
                "the file is one shard of a split GGUF and is not named like one",
                where=files[0],
                found=f"{Keys.Split.LLM_KV_SPLIT_COUNT} = {count}",
                expected=f"NAME-00001-of-{count:05d}.gguf beside the other shards",
                fix="give the shards the names they were written under",
            )
        return
    marks = [_plain(values, SET) for values in key_values]
    if len(set(map(repr, marks))) > 1:
        common = Counter(map(repr, marks)).most_common(1)[0][0]
        others = [file.name for file, mark in zip(files, marks, strict=True) if repr(mark) != common]
        raise CheckpointError(
            "the shards are of different sets: files of two conversions stand side by side",
            where=files[0].parent,
            found=f"another {SET} than in the other shards, or none: {listed(others)}",
            expected="shards of one conversion",
            fix="if a run that replaced them was interrupted, run it again; else fetch or write the whole set again",
        )
    for key, expected in (
        (Keys.Split.LLM_KV_SPLIT_NO, range(len(files))),
        (Keys.Split.LLM_KV_SPLIT_COUNT, [len(files)] * len(files)),
        (Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, [tensors] * len(files)),
    ):
        for file, values, right in zip(files, key_values, expected, strict=True):
            found = _plain(values, key)
            if found is not None and found != right:
                raise CheckpointError(
                    "the shards do not belong together: what one says of the split is not what is there",
                    where=file,
                    found=f"{key} = {reprlib.repr(found)}",
                    expected=right,
                    fix="put the shards of one split, under the names they were written under, in one directory",
                )


def _plain(values: Mapping[str, Value], key: str) -> Any:
    return values[key].value if key in values else None
