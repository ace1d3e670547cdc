"""GGUF files of every family and of imatrix, as the product writes them."""

from __future__ import annotations

import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.writers import write_plan
from tests.fuzz.mutations.gguf_file import ARRAY, STRING, Gguf, Info, Items, packed, parsed
from tests.fuzz.seeds import models, tokenizers
from tests.fuzz.tree import Tree, write_tree
from tests.support.tuning import RECORD


@cache
def converted(family: str, outtype: str = "f32", split: int | None = None, wide: bool = False) -> Tree:
    """The files that a model directory becomes."""
    tree = dict(models.directory(family))
    if wide:
        tree["config.json"] = models.as_json(models.WIDE)
        tree["model.safetensors"] = models.safetensors(models.plain(models.drawn(models.WIDE)))
    return _written(tree, outtype, split)


@cache
def with_sentencepiece(kind: str) -> Tree:
    """A model with a SentencePiece vocabulary."""
    tree = {name: content for name, content in models.directory("bamba").items() if name != "tokenizer.json"}
    return _written({**tree, **tokenizers.sentencepiece(kind)}, "bf16", None)


def _written(tree: Tree, outtype: str, split: int | None) -> Tree:
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "in").mkdir()
        write_tree(tree, place / "in")
        conversion = plan_conversion(
            place / "in",
            outtype=outtype,
            outfile=place / "model.gguf",
            split_max_bytes=split,
            model_name="Mill",
        )
        plan = conversion
        if outtype == "q4_k_m":
            plan = with_key_values(plan, {**plan.metadata, **RECORD.key_values()})
        written = write_plan(plan, conversion.outfile, threads=1, compiled=False)
        return {file.name: file.read_bytes() for file in written}


@cache
def unrepaired() -> Tree:
    """A file as llama.cpp's converter leaves it: without the product's own keys."""
    (raw,) = converted("bamba").values()
    assert isinstance(raw, bytes)
    file = parsed(raw)
    values = tuple(value for value in file.values if not value[0].startswith(b"bamba_quant"))
    return {"model.gguf": packed(replace(file, values=values))}


def measured() -> dict[str, int]:
    """Columns of every matrix of the small Bamba's GGUF that an imatrix has an entry for."""
    (raw,) = converted("bamba").values()
    assert isinstance(raw, bytes)
    return {
        info.name.decode(): info.dims[0]
        for info in parsed(raw).tensors
        if len(info.dims) == 2 and info.name.endswith(b".weight") and b"conv1d" not in info.name
    }


@cache
def imatrix() -> bytes:
    """An imatrix in GGUF."""
    tensors: list[Info] = []
    data = b""
    for name, columns in measured().items():
        for end, dims, array in (
            (".in_sum2", (columns, 1), np.linspace(1, 2, columns, dtype=np.float32)),
            (".counts", (1, 1), np.array([512], np.float32)),
            (".in_sum", (columns, 1), np.linspace(-1, 1, columns, dtype=np.float32)),
        ):
            tensors.append(Info((name + end).encode(), dims, 0, len(data)))
            data += array.tobytes()
            data += bytes(-len(data) % 32)
    values: tuple[tuple[bytes, int, Any], ...] = (
        (b"general.type", STRING, b"imatrix"),
        (b"imatrix.datasets", ARRAY, Items(STRING, (b"calibration.txt",))),
        (b"imatrix.chunk_count", 4, 10),
        (b"imatrix.chunk_size", 4, 512),
    )
    return packed(Gguf(3, values, tuple(tensors), data))


@cache
def dat_imatrix() -> bytes:
    """The same in llama.cpp's older form."""
    entries = measured()
    parts = [struct.pack("<i", len(entries))]
    for name, columns in entries.items():
        raw = name.encode()
        parts.append(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", 10, columns))
        parts.append(np.linspace(1, 2, columns, dtype="<f4").tobytes())
    return b"".join(parts) + struct.pack("<ii", 10, 4) + b"text"
