"""A ``.bin`` file's tensors are torch's own, and a pickle or archive that would take memory or run code is refused."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bamba_quant.checkpoint import read_tensor
from bamba_quant.checkpoint.state_dict import PickleError, read_state_dict
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import CheckpointError

BIG = torch.randn(10, 7)


def _parameter() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = 3  # torch pickles its attributes with it
    return parameter


MODULE = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Embedding(5, 2), torch.nn.LSTM(3, 2))
STATES: dict[str, Any] = {
    "state_dict": MODULE.state_dict(),
    "bfloat16": MODULE.to(torch.bfloat16).state_dict(),
    "half": {"a": torch.randn(4).half()},
    "parameters": dict(MODULE.named_parameters()),
    "attributes": {"a": _parameter()},
    "views": {
        "rows": BIG[3:5],
        "number": BIG[0, 2],
        "none": BIG.flatten()[5:5],
        "all": BIG,
        "row": BIG[:1].T.T,
    },
    "tied": {"a": BIG, "b": BIG},
    "empty": {},
}


@pytest.mark.parametrize("name", STATES)
def test_as_torch_loads_it(name: str, tmp_path: Path) -> None:
    torch.save(STATES[name], tmp_path / "x.bin")
    found = read_torch_file(tmp_path / "x.bin")
    expected = torch.load(tmp_path / "x.bin", weights_only=True)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].shape == tuple(tensor.shape)
        assert (
            read_tensor(found[key]).tobytes()
            == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"a": BIG.T}, "contiguous"),
        ({"a": torch._neg_view(BIG)}, "contiguous"),
        ({"a": BIG.to_sparse()}, "a call of"),
        ({"a": BIG.int()}, "dtype"),
        ({"a": BIG.to(torch.uint16)}, "rebuild_tensor_v3"),
        ({"a": {"b": BIG}}, "not a tensor"),
        ({1: BIG}, "not text"),
        ([BIG], "dictionary"),
        (BIG, "dictionary"),
    ],
)
def test_other_contents(state: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=complaint):
        read_torch_file(tmp_path / "x.bin")


class _Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


PICKLES: dict[str, bytes] = {
    "a large bytearray": pickle.dumps({"a": _Calls(bytearray, 3 * 10**9)}, 2),
    "a large tensor": pickle.dumps({"a": _Calls(torch.Tensor, 10**9)}, 2),
    "bytearray8": b"\x80\x05\x96" + (3 * 10**9).to_bytes(8, "little") + b".",
    "binunicode": b"\x80\x02X\xff\xff\xff\xff.",
    "a memo index": b"\x80\x02}r\xff\xff\xff\xff.",
    "an unknown memo index": b"\x80\x02h\x07.",
    "code": pickle.dumps({"a": _Calls(print, "x")}, 2),
    "a hash of tuples": b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"K\x01s.",
    "a set": pickle.dumps({"a": {1, 2}}, 2),
    "a counter": pickle.dumps(collections.Counter("aab"), 2),
    "protocol 5": pickle.dumps({"a": [1.0] * 10}, 5),
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x020.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_interpreted_in_bounds(name: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        assert name == "a memo index" and read_state_dict(PICKLES[name]) == {}
    except (PickleError, ValueError, LookupError, AssertionError):
        assert name != "a memo index"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50_000_000
    assert time.process_time() - started < 5


def archive(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", pickled, compression)
        made.writestr("archive/data/0", b"\0" * 8)
    return file


@pytest.mark.parametrize("name", [name for name in PICKLES if name != "a memo index"])
def test_pickles_in_archives_are_refused_by_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_file(archive(tmp_path / "x.bin", PICKLES[name]))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_pickle_is_not_inflated(compression: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"compressed[\s\S]*data\.pkl"):
        read_torch_file(archive(tmp_path / "x.bin", b"\0" * 10**7, compression))


def test_an_encrypted_archive(tmp_path: Path) -> None:
    raw = bytearray(archive(tmp_path / "x.bin", pickle.dumps({}, 2)).read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        raw[raw.index(signature) + flags] |= 1
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match="encrypted"):
        read_torch_file(tmp_path / "x.bin")


def test_a_large_pickle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"data\.pkl of 17,000,000 bytes"):
        read_torch_file(archive(tmp_path / "x.bin", b"\0" * 17_000_000))
    started = time.process_time()
    with pytest.raises(CheckpointError, match="opcodes"):
        read_torch_file(archive(tmp_path / "x.bin", b"\x80\x02" + b"N" * 5_000_000))
    assert time.process_time() - started < 10


@pytest.mark.parametrize("zip64", [False, True])
def test_a_long_list_of_members(zip64: bool, tmp_path: Path) -> None:
    """The list is refused by the length that the archive's end gives, before it is read."""
    raw = archive(tmp_path / "x.bin", pickle.dumps({}, 2)).read_bytes()
    begin, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    entries, padding = raw[begin:end], bytes(9_000_000)
    size, count = len(entries) + len(padding), raw[end + 10 : end + 12]
    tail = b"PK\5\6" + raw[end + 4 : end + 12] + struct.pack("<IIH", size, begin, 0)
    if zip64:
        record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, size, begin)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1)
        tail = record + locator + b"PK\5\6" + bytes(4) + count * 2 + b"\xff" * 8 + bytes(2)
    (tmp_path / "x.bin").write_bytes(raw[:begin] + entries + padding + tail)
    with pytest.raises(CheckpointError, match=r"x\.bin[\s\S]*a list of zip entries of 9,000,\d+ bytes"):
        read_torch_file(tmp_path / "x.bin")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": BIG}, buffer)
    raw = buffer.getvalue().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "shape", ["(2**62, 2**62)", "(0, 2**62)", "(-1,)", "(1.5,)", "(1,) * 33", "'ab'", "(10**5000,)"]
)
def test_shapes_that_no_array_has(shape: str, tmp_path: Path) -> None:
    lengths = eval(shape)
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
    numbers = pickle.dumps(lengths, 2)[2:-1]
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + numbers * 2 + b"\x89})tR"
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        read_torch_file(archive(tmp_path / "x.bin", b"\x80\x02}X\x01\0\0\0a" + tensor + b"s."))
