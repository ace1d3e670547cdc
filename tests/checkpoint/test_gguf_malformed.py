"""What ggml refuses in a GGUF is refused by name; a value of a wrong type in any key is never a traceback."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import GGUFValueType as Type

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.checkpoint.gguf_header import MAX_ARRAY_ITEMS, MAX_KEYS, MAX_TENSORS
from bamba_quant.checkpoint.gguf_values import GgufValue, KeyValues, uint32
from bamba_quant.errors import BambaQuantError, CheckpointError
from bamba_quant.families import family_of_gguf
from bamba_quant.inference.loading import load_model
from bamba_quant.metadata.model_card import render_model_card
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.repair import needs_repair
from bamba_quant.tokenizers.export import generation_config, tokenizer_files
from tests.support.conversion import to_gguf
from tests.support.families import FAMILIES, random_case, save
from tests.support.raw_gguf import RawGGUF, Tensor, ggml_reads

ARCHITECTURE = ("general.architecture", GgufValue(Type.STRING, "x"))


def nested(levels: int) -> bytes:
    return struct.pack("<I", Type.ARRAY) + struct.pack("<IQ", Type.ARRAY, 1) * levels


def with_value(key: str, value: GgufValue | bytes) -> RawGGUF:
    return RawGGUF(values=(ARCHITECTURE, (key, value)))


def with_tensors(*tensors: Tensor, **options: Any) -> RawGGUF:
    return RawGGUF(tensors=tensors, **options)


REFUSED: dict[str, tuple[RawGGUF, str]] = {
    "version 1": (RawGGUF(version=1), "version 1"),
    "version 4": (RawGGUF(version=4), "version 4"),
    "big-endian": (RawGGUF(version=3 << 24), "big-endian"),
    "more tensors than there are": (RawGGUF(tensor_count=3), "offset"),
    "2^62 tensors": (RawGGUF(tensor_count=2**62), f"at most {MAX_TENSORS}"),
    "2^62 key-values": (RawGGUF(value_count=2**62), f"{MAX_KEYS}"),
    "a key twice": (RawGGUF(values=(ARCHITECTURE, ARCHITECTURE)), "general.architecture' twice"),
    "a key without a name": (with_value("", uint32(1)), "without a name"),
    "an unknown value type": (with_value("x", struct.pack("<I", 13)), "in key 'x'"),
    "a string longer than the file": (with_value("x", struct.pack("<IQ", 8, 2**63)), "ends inside"),
    "an array longer than the file": (with_value("x", struct.pack("<IIQ", 9, 0, 2**20)), "ends inside"),
    "an array of 2^62": (with_value("x", struct.pack("<IIQ", 9, 0, 2**62)), f"{MAX_ARRAY_ITEMS}"),
    "an array of arrays": (with_value("x", nested(1)), "array of arrays"),
    "arrays nested 3,000 deep": (with_value("x", nested(3000)), "array of arrays"),
    "alignment 0": (with_value("general.alignment", uint32(0)), "power of two"),
    "alignment 24": (with_value("general.alignment", uint32(24)), "power of two"),
    "alignment of another type": (with_value("general.alignment", GgufValue(Type.STRING, "32")), "string"),
    "alignment as uint64": (with_value("general.alignment", GgufValue(Type.UINT64, 32)), "uint64"),
    "a tensor twice": (with_tensors(Tensor("a"), Tensor("a", offset=32)), "tensor 'a' twice"),
    "overlapping tensors": (with_tensors(Tensor("a", (16,)), Tensor("b", offset=32)), r"tensor b[\s\S]*64"),
    "a gap": (with_tensors(Tensor("a"), Tensor("b", offset=64)), r"tensor b[\s\S]*32"),
    "a misaligned offset": (with_tensors(Tensor("a"), Tensor("b", offset=16)), r"tensor b[\s\S]*32"),
    "a first offset": (with_tensors(Tensor("a", offset=32)), "tensor a"),
    "a name of 64 bytes": (with_tensors(Tensor("x" * 64)), "more than 63 bytes"),
    "5 dimensions": (with_tensors(Tensor("a", (1,) * 5)), "5 dimensions"),
    "10^6 dimensions": (with_tensors(Tensor("a", (1,) * 10**6)), "1000000 dimensions"),
    "2^63 elements": (with_tensors(Tensor("a", (2**32, 2**31))), r"2\^63"),
    "a negative dimension": (with_tensors(Tensor("a", (2**64 - 1,))), r"2\^63"),
    "a row of half a block": (with_tensors(Tensor("a", (16,), GGMLQuantizationType.Q8_0)), "multiple of 32"),
    **{
        f"type {number}": (with_tensors(Tensor("a", (256,), number)), f"ggml type {number}")
        for number in (4, 5, 31, 32, 33, 36, 37, 38, 99, 2**31)
    },
}
# What ggml's reader of headers leaves to llama.cpp's loader.
LATER_THERE = {"truncated data": (with_tensors(Tensor("a", (256,)), data=1023), "truncated")}


@pytest.mark.parametrize("name", REFUSED | LATER_THERE)
def test_what_ggml_refuses_is_refused(name: str, tmp_path: Path) -> None:
    raw, message = (REFUSED | LATER_THERE)[name]
    file = raw.write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert ggml_reads(file) is (name in LATER_THERE)


def test_what_ggml_takes_is_taken(tmp_path: Path) -> None:
    for number, raw in enumerate(
        (
            RawGGUF(),
            RawGGUF(version=2),
            RawGGUF(values=(ARCHITECTURE, ("general.alignment", uint32(8)))),
            with_tensors(Tensor("a", ()), Tensor("b", (0,), offset=32), Tensor("c", (0, 2**40), offset=32)),
            with_tensors(Tensor("q", (0, 3), GGMLQuantizationType.Q8_0)),
        )
    ):
        if number == 2:
            raw = replace(raw, alignment=8, tensors=(Tensor("a"), Tensor("b", offset=16)))
        file = raw.write(tmp_path / f"{number}.gguf")
        assert ggml_reads(file)
        assert len(open_checkpoint(file).tensors) == len(raw.tensors)
        for tensor in open_checkpoint(file).tensors.values():
            assert read_tensor(tensor).shape == tensor.shape


def test_every_type_that_gguf_py_knows_is_listed(tmp_path: Path) -> None:
    tensors, offset = [], 0
    for kind, (block_size, block_bytes) in GGML_QUANT_SIZES.items():
        tensors.append(Tensor(kind.name.lower(), (block_size,), int(kind), offset))
        offset += -(-block_bytes // 32) * 32
    found = inspect_path(with_tensors(*tensors, data=offset).write(tmp_path / "x.gguf"))
    assert {tensor.name: tensor.format.name for tensor in found.tensors} == {
        tensor.name: tensor.name for tensor in tensors
    }


@pytest.mark.parametrize(("kind", "size"), [("i32", 4), ("f64", 8)])
def test_types_that_are_not_weights_are_named(kind: str, size: int, tmp_path: Path) -> None:
    file = to_gguf_of("bamba", tmp_path)
    name = "output_norm.weight"
    n_bytes = open_checkpoint(file).tensors[name].n_bytes
    whole = bytearray(file.read_bytes())
    at = whole.index(name.encode()) + len(name) + 4  # behind the number of dimensions
    whole[at : at + 12] = struct.pack("<QI", n_bytes // size, GGMLQuantizationType[kind.upper()])
    file.write_bytes(whole)
    with pytest.raises(BambaQuantError, match=rf"tensor {name}[\s\S]*{kind}"):
        load_model(file)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00001.gguf", "m-00003-of-00002.gguf"])
def test_names_of_shards_that_cannot_be(name: str, tmp_path: Path) -> None:
    for number in (1, 2):
        RawGGUF().write(tmp_path / f"m-0000{number}-of-00002.gguf")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(RawGGUF().write(tmp_path / name))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for number in (0, 1):
        split = [("split.no", number), ("split.count", 2), ("split.tensors.count", 2)]
        values = [
            (key, GgufValue(Type.INT32 if "tensors" in key else Type.UINT16, value)) for key, value in split
        ]
        RawGGUF(values=(ARCHITECTURE, *values), tensors=(Tensor("a"),)).write(
            tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        )
    with pytest.raises(CheckpointError, match=r"00002-of-00002[\s\S]*a, also in"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        open_checkpoint(tmp_path / "x.gguf")


WRONG: tuple[GgufValue, ...] = (
    *(GgufValue(Type.UINT64, number) for number in (0, 1, 3, 2**17, 2**29, 2**31, 2**32, 2**63)),
    GgufValue(Type.INT64, -1),
    *(GgufValue(Type.FLOAT32, number) for number in (0.0, -1.0, 2.5, 1e-40, float("nan"), float("inf"))),
    GgufValue(Type.STRING, ""),
    GgufValue(Type.STRING, "8"),
    GgufValue(Type.STRING, b"\xff\0\x1b[2K".decode("utf-8", "surrogateescape")),
    GgufValue(Type.BOOL, True),
    GgufValue(Type.BOOL, False),
    GgufValue(Type.ARRAY, [], Type.UINT32),
    GgufValue(Type.ARRAY, [2**31] * 4, Type.UINT32),
    GgufValue(Type.ARRAY, [0, 1, 2, 3], Type.UINT8),
    GgufValue(Type.ARRAY, [float("nan")], Type.FLOAT32),
    GgufValue(Type.ARRAY, ["a", "a"], Type.STRING),
    GgufValue(Type.ARRAY, [True], Type.BOOL),
)
_MORE_KEYS = ("general.base_model.count", "general.dataset.count", "general.tags", "general.file_type")


def to_gguf_of(family: str, directory: Path) -> Path:
    save(random_case(family), directory / "model")
    return to_gguf(directory / "model", directory / "x.gguf", vocab=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_values_in_every_key(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(to_gguf_of(family, tmp_path))
    readers: dict[str, Callable[[KeyValues], object]] = {
        "configuration": lambda values: family_of_gguf(values).tensors(
            family_of_gguf(values).config_of_gguf(values, checkpoint.tensors)
        ),
        "repair": needs_repair,
        "card": lambda values: render_model_card(values, "title", "origin"),
        "tokenizer": lambda values: tokenizer_files(checkpoint.path, values, 1),
        "generation": lambda values: generation_config(checkpoint.path, values),
    }
    refused = 0
    for key in (*checkpoint.key_values, *_MORE_KEYS):
        for wrong in WRONG:
            values = KeyValues({**checkpoint.key_values, key: wrong}, checkpoint.path)
            for read in readers.values():
                try:
                    read(values)
                except BambaQuantError as error:
                    refused += 1
                    assert len(str(error)) < 2000
    assert refused > 200
    # Of those that one number makes huge, none is believed.
    architecture = checkpoint.key_values.text("general.architecture")
    for key in ("block_count", "embedding_length", "vocab_size"):
        values = KeyValues({**checkpoint.key_values, f"{architecture}.{key}": uint32(2**31)}, checkpoint.path)
        with pytest.raises(BambaQuantError, match=rf"{key}[\s\S]*{2**31}"):
            readers["configuration"](values)
    tokens = GgufValue(
        Type.ARRAY, ["a", "b"], Type.STRING
    )  # llama.cpp wants as many as the embedding has rows
    values = KeyValues({**checkpoint.key_values, "tokenizer.ggml.tokens": tokens}, checkpoint.path)
    with pytest.raises(BambaQuantError, match=r"vocab_size[\s\S]*2, the length of"):
        readers["configuration"](values)


def test_inspect_lists_a_file_whose_key_values_are_wrong(tmp_path: Path) -> None:
    raw = RawGGUF(
        values=(
            ("general.architecture", GgufValue(Type.STRING, "granitehybrid")),
            ("granitehybrid.block_count", GgufValue(Type.STRING, "many")),
        )
    )
    found = inspect_path(raw.write(tmp_path / "y.gguf"))
    assert len(found.tensors) == 2
    assert "block_count" in "".join(found.remarks)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    file = to_gguf_of("bamba", tmp_path)
    model = load_model(file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=file.name):
        for name in model.weights:
            np.asarray(model.weights[name])
