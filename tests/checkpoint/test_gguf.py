"""GGUF values and files: the same bytes gguf-py writes, read as gguf-py reads them, and errors for damaged ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bamba_quant.checkpoint import open_checkpoint, read_tensor
from bamba_quant.checkpoint.gguf_file import split_files, split_name, split_stem
from bamba_quant.checkpoint.gguf_header import Cursor
from bamba_quant.checkpoint.gguf_values import SCALAR_DTYPES, GgufValue, pack_value
from bamba_quant.errors import CheckpointError

INTEGERS = {kind: dtype for kind, dtype in SCALAR_DTYPES.items() if dtype.kind in "iu"}


def scalars(kind: Type) -> st.SearchStrategy[Any]:
    if kind == Type.STRING:
        return st.text()
    if kind == Type.BOOL:
        return st.booleans()
    if kind == Type.FLOAT32:
        return st.floats(width=32, allow_nan=False)
    if kind == Type.FLOAT64:
        return st.floats(allow_nan=False)
    limits = np.iinfo(INTEGERS[kind])
    return st.integers(int(limits.min), int(limits.max))


SCALAR_TYPES = [*SCALAR_DTYPES, Type.STRING]


@st.composite
def values(draw: st.DrawFn) -> GgufValue:
    kind = draw(st.sampled_from(SCALAR_TYPES))
    if draw(st.booleans()):
        return GgufValue(Type.ARRAY, draw(st.lists(scalars(kind), min_size=1, max_size=8)), kind)
    return GgufValue(kind, draw(scalars(kind)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values())
def test_packed_as_gguf_py_packs_and_read_back(value: GgufValue) -> None:
    packed = pack_value(value)
    writer = gguf.GGUFWriter(None, "x")
    assert packed == writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.item)
    cursor = Cursor(io.BytesIO(packed), len(packed))
    assert cursor.value() == value
    assert cursor.position == len(packed)


def test_strings_that_are_not_utf8() -> None:
    odd = GgufValue(Type.STRING, b"\xff\xfe".decode("utf-8", "surrogateescape"))
    packed = pack_value(odd)
    assert Cursor(io.BytesIO(packed), len(packed)).value() == odd


def written_by_gguf_py(file: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((6, 256)).astype(np.float32),
        "b.weight": rng.standard_normal((4, 64)).astype(np.float16),
        "c": rng.standard_normal(5).astype(np.float32),
    }
    writer = gguf.GGUFWriter(str(file), "granitehybrid")
    writer.add_block_count(3)
    writer.add_head_count_kv([0, 2, 0])
    writer.add_token_list(["a", "ü", "漢"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    quantized = gguf.quantize(tensors["a.weight"], gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors | {"q.weight": gguf.dequantize(quantized, gguf.GGMLQuantizationType.Q4_0)}


def test_reads_what_gguf_py_wrote(tmp_path: Path) -> None:
    expected = written_by_gguf_py(tmp_path / "x.gguf")
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.kind == "gguf"
    assert checkpoint.metadata["granitehybrid.attention.head_count_kv"].value == [0, 2, 0]
    assert checkpoint.metadata["tokenizer.ggml.tokens"].value == ["a", "ü", "漢"]
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read_tensor(checkpoint.tensors[name]), tensor)


def test_every_truncation_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    written_by_gguf_py(file)
    whole = file.read_bytes()
    for size in [4, 8, 20, *range(30, len(whole) - 40, 97)]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            open_checkpoint(file)


def test_what_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    for content in (b"", b"PK\x03\x04", b"GGUF" + (1).to_bytes(4, "little") + bytes(16)):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            open_checkpoint(file)


def test_split_names(tmp_path: Path) -> None:
    assert split_name(tmp_path / "m", 1, 3).name == "m-00002-of-00003.gguf"
    assert split_stem(tmp_path / "m-00002-of-00003.gguf") == tmp_path / "m"
    assert split_stem(tmp_path / "m.gguf") == tmp_path / "m"
    (tmp_path / "m-00001-of-00002.gguf").touch()
    with pytest.raises(CheckpointError, match="m-00002-of-00002"):
        split_files(tmp_path / "m-00001-of-00002.gguf")
