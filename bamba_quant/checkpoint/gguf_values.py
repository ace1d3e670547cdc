"""GGUF's typed values, packed to bytes and read back exactly.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Strings that are no UTF-8 survive a round trip
as surrogate escapes, since a vocabulary may hold any bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

SCALAR_DTYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Value:
    """A value with its GGUF type; for an array ``item`` is the type of its elements."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None


def string(value: str) -> Value:
    return Value(GGUFValueType.STRING, value)


def uint16(value: int) -> Value:
    return Value(GGUFValueType.UINT16, value)


def uint32(value: int) -> Value:
    return Value(GGUFValueType.UINT32, value)


def int32(value: int) -> Value:
    return Value(GGUFValueType.INT32, value)


def float32(value: float) -> Value:
    return Value(GGUFValueType.FLOAT32, value)


def boolean(value: bool) -> Value:
    return Value(GGUFValueType.BOOL, value)


def array(item: GGUFValueType, values: Sequence[Any]) -> Value:
    return Value(GGUFValueType.ARRAY, list(values), item)


def pack_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: Value) -> bytes:
    """The type tag and the value, as they follow a key."""
    return struct.pack("<I", value.type) + _pack_untagged(value)


def _pack_untagged(value: Value) -> bytes:
    if value.type == GGUFValueType.STRING:
        return pack_string(value.value)
    if value.type != GGUFValueType.ARRAY:
        return np.asarray(value.value, dtype=SCALAR_DTYPES[value.type]).tobytes()
    assert value.item is not None, "an array carries the type of its items"
    head = struct.pack("<IQ", value.item, len(value.value))
    if value.item in SCALAR_DTYPES:
        return head + np.asarray(value.value, dtype=SCALAR_DTYPES[value.item]).tobytes()
    if value.item == GGUFValueType.STRING:
        return head + b"".join(map(pack_string, value.value))
    return head + b"".join(_pack_untagged(element) for element in value.value)


class Cursor:
    """Reads typed values from a buffer, one after another. Raises ``EOFError`` past its end."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.position = 0

    def take(self, count: int) -> memoryview:
        if count < 0 or self.position + count > len(self.buffer):
            raise EOFError
        self.position += count
        return self.buffer[self.position - count : self.position]

    def number(self, kind: GGUFValueType) -> Any:
        dtype = SCALAR_DTYPES[kind]
        return np.frombuffer(self.take(dtype.itemsize), dtype=dtype)[0].item()

    def text(self) -> str:
        length = self.number(GGUFValueType.UINT64)
        return str(self.take(length), "utf-8", "surrogateescape")

    def value(self) -> Value:
        """A type tag and its value. Raises ``ValueError`` for a tag the format does not know."""
        return self._untagged(GGUFValueType(self.number(GGUFValueType.UINT32)))

    def _untagged(self, kind: GGUFValueType) -> Value:
        if kind == GGUFValueType.STRING:
            return Value(kind, self.text())
        if kind != GGUFValueType.ARRAY:
            return Value(kind, self.number(kind))
        item = GGUFValueType(self.number(GGUFValueType.UINT32))
        count = self.number(GGUFValueType.UINT64)
        if item in SCALAR_DTYPES:
            dtype = SCALAR_DTYPES[item]
            return Value(kind, np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist(), item)
        if item == GGUFValueType.STRING:
            return Value(kind, self._texts(count), item)
        return Value(kind, [self._untagged(item) for _ in range(count)], item)

    def _texts(self, count: int) -> list[str]:
        # A vocabulary is 10^5 strings: one slice of bytes and integer reads keep it to a fraction of a second.
        buffer, position, texts = self.buffer, self.position, []
        for _ in range(count):
            length = int.from_bytes(buffer[position : position + 8], "little")
            position += 8
            if position + length > len(buffer):
                raise EOFError
            texts.append(str(buffer[position : position + length], "utf-8", "surrogateescape"))
            position += length
        self.position = position
        return texts
