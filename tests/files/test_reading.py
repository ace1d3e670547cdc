"""Inputs are regular files of bounded size: pipes, devices and files that change are errors, and nothing hangs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bamba_quant.checkpoint import RawReader, open_checkpoint, read_tensor
from bamba_quant.checkpoint.safetensors_file import read_safetensors
from bamba_quant.checkpoint.torch_file import read_torch_file
from bamba_quant.errors import BambaQuantError, CheckpointError
from bamba_quant.files.json_file import parse_json, read_json
from bamba_quant.files.reading import read_bytes
from bamba_quant.metadata.general import read_general
from bamba_quant.planning.quantize import plan_quantization
from tests.support.models import random_bamba, save_checkpoint


def _fifo(place: Path) -> None:
    os.mkfifo(place)


def _socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(place))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "pipe": _fifo,
    "directory": Path.mkdir,
    "device": lambda place: place.symlink_to("/dev/zero"),
    "socket": _socket,
}
READERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda file: read_json(file, "a test"),
    "bytes": lambda file: read_bytes(file, "a test"),
    "safetensors": read_safetensors,
    "bin": read_torch_file,
    "weights": lambda file: RawReader().open(file),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(
    kind: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    MAKERS[kind](Path("x"))
    with pytest.raises(CheckpointError, match=rf"x is not a regular file[\s\S]*{kind}"):
        READERS[reader](Path("x"))


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "directory"])
def test_a_model_that_is_not_a_regular_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    MAKERS[kind](Path("x"))
    with pytest.raises(CheckpointError, match=rf"x is not a regular file[\s\S]*{kind}"):
        open_checkpoint("x")
    Path("broken").symlink_to("nowhere")
    for name in ("nowhere", "broken"):
        with pytest.raises(CheckpointError, match="no such file"):
            open_checkpoint(name)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "README.md"]
)
def test_no_file_of_a_model_is_waited_for(name: str, kind: str, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    (directory / name).unlink(missing_ok=True)
    MAKERS[kind](directory / name)
    with pytest.raises(BambaQuantError, match=r"not a regular file|leaves the model"):
        plan_quantization(directory, "fp8-dynamic")


@pytest.mark.parametrize("name", ["README.md", "generation_config.json"])
def test_no_description_of_a_model_is_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _fifo(tmp_path / name)
    with pytest.raises(BambaQuantError, match=name):
        read_general(tmp_path, 1, architecture="bamba", model_name=None, overrides=None)


def test_too_large(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(
        CheckpointError, match=r"too large[\s\S]*1,099,511,627,776 bytes[\s\S]*at most 25,165,824"
    ):
        read_json(file, "a test")
    file.write_bytes(b"12345")
    assert read_bytes(file, "a test", limit=5) == b"12345"
    with pytest.raises(CheckpointError, match="too large"):
        read_bytes(file, "a test", limit=4)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_small_file_that_changes_its_size(
    change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b"{}  ")
    fdopen = os.fdopen

    def changed(*arguments: Any) -> Any:
        os.truncate(file, 4 + change)
        return fdopen(*arguments)

    monkeypatch.setattr(os, "fdopen", changed)
    with pytest.raises(CheckpointError, match=rf"changed while it was read[\s\S]*{4 + change} bytes"):
        read_json(file, "a test")


@pytest.mark.parametrize("left", [0, 8, 1000])
def test_weights_that_end_earlier_than_when_they_were_opened(left: int, tmp_path: Path) -> None:
    directory = save_checkpoint(random_bamba(), tmp_path / "m")
    checkpoint = open_checkpoint(directory)
    os.truncate(directory / "model.safetensors", left)
    with pytest.raises(
        CheckpointError, match=r"changed while it was read: it ends earlier[\s\S]*model\.safetensors"
    ):
        read_tensor(checkpoint.tensors["model.embed_tokens.weight"])


def test_a_descriptor_survives_a_file_that_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old!")
    with RawReader() as reader:
        reader.open(file)
        file.unlink()
        file.write_bytes(b"new!")
        buffer = np.empty(4, np.uint8)
        reader.read_into(file, 0, buffer)
    assert buffer.tobytes() == b"old!"


@pytest.mark.parametrize("nested", [b"[", b'{"a":'])
def test_nesting(nested: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[nested]
    levels = 99
    text = b'{"x":' + nested * levels + b"1" + closing * levels + b"}"
    assert parse_json(text, "here")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        parse_json(b'{"x":' + text + b"}", "here")


@pytest.mark.parametrize("number", ["1e400", "-1e999", "1" * 400 + ".0"])
def test_numbers_beyond_float64(number: str) -> None:
    with pytest.raises(CheckpointError, match="beyond the range"):
        parse_json(f'{{"x": [{number}]}}'.encode(), "here")
    assert parse_json(b'{"x": [0.0, Infinity]}', "here")  # as Python and transformers 4 write a limit


def test_a_repeated_key_among_many_is_found_in_linear_time() -> None:
    keys = ",".join(f'"k{number}": 1' for number in range(200_000))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"twice[\s\S]*'k199999'"):
        parse_json(f'{{{keys}, "k199999": 2}}'.encode(), "here")
    assert time.process_time() - started < 5
