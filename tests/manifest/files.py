"""What is recorded of an output file, and a GGUF with the row order of llama.cpp's converter."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VERSION_KEY = b"bamba_quant.version"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF value type -> bytes
_STRING, _ARRAY = 8, 9


def short_hash(*parts: bytes) -> str:
    """The first 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


class GgufLayout:
    """Offsets in a GGUF file: ``pairs`` of (key, begin, end), the begin of tensor entries and of tensor data."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.tensor_count, count = struct.unpack_from("<QQ", raw, 8)
        self.pairs: list[tuple[bytes, int, int]] = []
        self.alignment = 32
        at = 24
        for _ in range(count):
            begin = at
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", raw, at)
            if key == b"general.alignment":
                (self.alignment,) = struct.unpack_from("<I", raw, at + 4)
            at = self._skip(kind, at + 4)
            self.pairs.append((key, begin, at))
        self.entries = at
        # Name -> dimensions in GGUF's order, offset in the data.
        self.tensors: dict[str, tuple[tuple[int, ...], int]] = {}
        for _ in range(self.tensor_count):
            name, at = self._string(at)
            (axes,) = struct.unpack_from("<I", raw, at)
            *dimensions, _type, offset = struct.unpack_from(f"<{axes}QIQ", raw, at + 4)
            at += 4 + 8 * axes + 12
            self.tensors[name.decode()] = (tuple(dimensions), offset)
        self.entries_end = at
        self.data = -(-at // self.alignment) * self.alignment

    def _string(self, at: int) -> tuple[bytes, int]:
        (length,) = struct.unpack_from("<Q", self.raw, at)
        return self.raw[at + 8 : at + 8 + length], at + 8 + length

    def _skip(self, kind: int, at: int) -> int:
        if kind == _STRING:
            return self._string(at)[1]
        if kind == _ARRAY:
            kind, count = struct.unpack_from("<IQ", self.raw, at)
            at += 12
            if kind in _SIZES:
                return at + count * _SIZES[kind]
            for _ in range(count):
                at = self._skip(kind, at)
            return at
        return at + _SIZES[kind]


def recorded(file: Path) -> dict[str, str]:
    """Part of the file -> hash; the part is empty where the file is hashed as a whole."""
    raw = file.read_bytes()
    if raw[:4] == b"GGUF":
        layout = GgufLayout(raw)
        pairs = (key if key == VERSION_KEY else raw[begin:end] for key, begin, end in layout.pairs)
        return {":keys": short_hash(*pairs), ":tensors": short_hash(raw[layout.entries :])}
    if file.suffix == ".safetensors":
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        metadata = json.dumps(header.pop("__metadata__", None), sort_keys=True)
        return {
            ":metadata": short_hash(metadata.encode()),
            ":tensors": short_hash(json.dumps(header).encode(), raw[8 + length :]),
        }
    if file.suffix == ".toml":
        import tomllib

        return {"": short_hash(json.dumps(tomllib.loads(raw.decode()), sort_keys=True).encode())}
    if file.suffix in (".json", ".md"):
        raw = re.sub(rb"(bamba-quant[ `\"]*(?:version)?[ :\"]*)\d+\.\d+[\w.+-]*", rb"\1VERSION", raw)
    return {"": short_hash(raw)}


# Keys of reports that hold times, paths, text, and the noise floor, which no two processors have in common.
_LEFT_OUT = re.compile(
    r"floor|timing|seconds|speed|path|version|time|when|host|machine|processor|memory|threads|remarks|notes"
)


def numbers_of(value: Any) -> dict[str, float]:
    """Dotted path, with ``*`` for list indices -> a sum of its numbers, each times its position from 1."""
    sums: dict[str, float] = {}
    positions: dict[str, int] = {}
    for path, number in _numbers(value, ""):
        positions[path] = positions.get(path, 0) + 1
        sums[path] = sums.get(path, 0.0) + positions[path] * number
    return {path: float(f"{total:.5g}") for path, total in sums.items()}


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not _LEFT_OUT.search(key):
                yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, f"{path}.*" if path else "*")
    elif isinstance(value, int | float):
        yield path, float(value)


def imatrix_figures(file: Path) -> dict[str, float]:
    """The sums of a GGUF importance matrix, a number for each tensor."""
    layout = GgufLayout(file.read_bytes())
    figures: dict[str, float] = {}
    for name, (dimensions, offset) in layout.tensors.items():
        values = np.frombuffer(layout.raw, "<f4", int(np.prod(dimensions)), layout.data + offset)
        figures[name] = float(f"{float(values.astype(np.float64).sum()):.5g}")
    return figures


def without_key(layout: GgufLayout, dropped: bytes) -> bytes:
    """The file without one key."""
    kept = [layout.raw[begin:end] for key, begin, end in layout.pairs if key != dropped]
    raw = layout.raw[:16] + struct.pack("<Q", len(kept)) + b"".join(kept)
    raw += layout.raw[layout.entries : layout.entries_end]
    return raw + bytes(-len(raw) % layout.alignment) + layout.raw[layout.data :]


def write_faulty(right: Path, wrong: Path, heads: dict[str, int], rotated: int) -> None:
    """Bamba as llama.cpp's converter writes it: rows of q and k interleaved over whole heads.

    ``right`` has the first ``rotated`` rows of each head interleaved. Rows are moved as bytes, so any type will do.
    """
    layout = GgufLayout(right.read_bytes())
    raw = bytearray(layout.raw)
    offsets = sorted([offset for _, offset in layout.tensors.values()] + [len(raw) - layout.data])
    for name, (dimensions, offset) in layout.tensors.items():
        leaf = name.split(".")[2] if name.startswith("blk.") else ""
        if leaf not in heads:
            continue
        count = dimensions[1] if len(dimensions) > 1 else dimensions[0]
        width = (offsets[offsets.index(offset) + 1] - offset) // count
        begin = layout.data + offset
        rows = np.frombuffer(layout.raw, np.uint8, count * width, begin).reshape(heads[leaf], -1, width)
        plain = rows.copy()
        plain[:, : rotated // 2], plain[:, rotated // 2 : rotated] = (
            rows[:, 0:rotated:2],
            rows[:, 1:rotated:2],
        )
        half = rows.shape[1] // 2
        whole = np.stack((plain[:, :half], plain[:, half:]), axis=2)
        raw[begin : begin + count * width] = whole.tobytes()
    layout.raw = bytes(raw)
    wrong.write_bytes(without_key(layout, VERSION_KEY))
