"""Files that are well formed and wrong, as a faulty converter or kernel would write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from bamba_quant.checkpoint import StoredTensor, open_checkpoint

Bytes = NDArray[np.uint8]


def edited(source: Path, target: Path, tensors: dict[str, Callable[[Bytes, StoredTensor], Bytes]]) -> Path:
    """A copy of a GGUF with the raw bytes of some ``tensors`` changed: (rows, bytes of a row) each."""
    shutil.copy(source, target)
    stored = open_checkpoint(source).tensors
    with target.open("r+b") as file:
        for name, change in tensors.items():
            tensor = stored[name]
            file.seek(tensor.offset)
            raw = np.frombuffer(file.read(tensor.n_bytes), np.uint8).reshape(tensor.rows, -1)
            changed = change(raw.copy(), tensor)
            assert changed.shape == raw.shape
            assert not np.array_equal(changed, raw)
            file.seek(tensor.offset)
            file.write(changed.tobytes())
    return target


def neighbours_scales_swapped(at: int, n_bytes: int) -> Callable[[Bytes, StoredTensor], Bytes]:
    """The scales of every two blocks of a row, ``n_bytes`` at byte ``at`` of a block, in each other's place."""

    def change(raw: Bytes, tensor: StoredTensor) -> Bytes:
        blocks = raw.reshape(len(raw), -1, 2, tensor.format.block_bytes)
        scales = blocks[..., at : at + n_bytes].copy()
        blocks[..., at : at + n_bytes] = scales[:, :, ::-1]
        return raw

    return change


def zeroed(raw: Bytes, tensor: StoredTensor) -> Bytes:
    """In every format of GGUF a block of zero bytes is a block of zeros."""
    return np.zeros_like(raw)


def edited_directory(source: Path, target: Path, changes: dict[str, Callable[[Bytes], Bytes]]) -> Path:
    """A copy of a one-shard safetensors directory with the bytes of some tensors changed: (rows, bytes) each."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, change in changes.items():
        first, last = (8 + length + offset for offset in header[name]["data_offsets"])
        raw = np.frombuffer(bytes(content[first:last]), np.uint8).reshape(header[name]["shape"][0], -1)
        changed = change(raw.copy())
        assert not np.array_equal(changed, raw)
        content[first:last] = changed.tobytes()
    file.write_bytes(bytes(content))
    with safe_open(file, "np") as opened:  # still a file that others read
        assert set(changes) <= set(opened.keys())
    return target


def neighbouring_rows_swapped(raw: Bytes) -> Bytes:
    return raw.reshape(-1, 2, raw.shape[1])[:, ::-1].reshape(raw.shape)
