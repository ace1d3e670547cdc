"""Reads a GGUF header: key-values and tensor entries, with an error wherever llama.cpp (ggml/src/gguf.cpp) has one.

Counts and lengths are checked against the size of the file before anything is allocated. Nothing is mapped into memory,
so a file that shrinks while it is read is an error instead of a SIGBUS.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFValueType, Keys

from bamba_quant.checkpoint.gguf_values import SCALAR_DTYPES, GgufValue

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Limits of a header. The largest in use: vocabularies of 500,000 tokens with as many merges in 30 MB, and some ten
# thousand tensors.
MAX_HEADER_BYTES = 1 << 27
MAX_ARRAY_ITEMS = 1 << 22  # of all arrays together
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME without the zero at its end
MAX_ALIGNMENT = 1 << 20


def padded_size(n_bytes: int) -> int:
    """The bytes a tensor takes in a file of the default alignment."""
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


_PIECE = 1 << 20  # bytes read at first; then as many again as are there
_U64 = struct.Struct("<Q")
_SCALARS = {kind: struct.Struct("<" + dtype.char) for kind, dtype in SCALAR_DTYPES.items()} | {
    GGUFValueType.UINT64: _U64,
    GGUFValueType.INT64: struct.Struct("<q"),
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a header describes it: ``shape`` in numpy's order, ``offset`` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """``data_start`` is the byte of the file at which the data section begins, a multiple of ``alignment``."""

    key_values: dict[str, GgufValue]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int


class Cursor:
    """Reads typed values one after another from the beginning of ``stream``, a file of ``size`` bytes.

    Raises ``EOFError`` where the file ends too early and ``ValueError`` for what the format does not allow.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.position = 0
        self._stream, self._size = stream, size
        self._buffer = bytearray()
        self._items = 0  # of all arrays so far

    def take(self, count: int) -> bytearray:
        """The next ``count`` bytes."""
        self._need(count)
        self.position += count
        return self._buffer[self.position - count : self.position]

    def first_bytes(self, stop: int) -> bytes:
        """The first ``stop`` bytes of the file; the position of the cursor stays."""
        self.position, position = 0, self.position
        try:
            self._need(stop)
        finally:
            self.position = position
        return bytes(self._buffer[:stop])

    def number(self, kind: GGUFValueType) -> Any:
        scalar = _SCALARS[kind]
        self._need(scalar.size)
        (found,) = scalar.unpack_from(self._buffer, self.position)
        self.position += scalar.size
        return found

    def text(self) -> str:
        return self.take(self.number(GGUFValueType.UINT64)).decode("utf-8", "surrogateescape")

    def value(self) -> GgufValue:
        """A type tag and its value."""
        kind = GGUFValueType(self.number(GGUFValueType.UINT32))
        if kind == GGUFValueType.STRING:
            return GgufValue(kind, self.text())
        if kind != GGUFValueType.ARRAY:
            return GgufValue(kind, self.number(kind))
        item = GGUFValueType(self.number(GGUFValueType.UINT32))
        count = self.number(GGUFValueType.UINT64)
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays, which llama.cpp does not read")
        self._items += count
        if self._items > MAX_ARRAY_ITEMS:
            raise ValueError(f"arrays of {self._items} items, more than the {MAX_ARRAY_ITEMS} supported")
        if item == GGUFValueType.STRING:
            return GgufValue(kind, self._texts(count), item)
        dtype = SCALAR_DTYPES[item]
        return GgufValue(kind, np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist(), item)

    def _texts(self, count: int) -> list[str]:
        # A vocabulary is 10^5 strings: this loop calls nothing for one that is in the buffer.
        texts = []
        for _ in range(count):
            start = self.position + 8
            if start > len(self._buffer):
                self._need(8)
            (length,) = _U64.unpack_from(self._buffer, self.position)
            if start + length > len(self._buffer):
                self._need(8 + length)
            texts.append(self._buffer[start : start + length].decode("utf-8", "surrogateescape"))
            self.position = start + length
        return texts

    def _need(self, count: int) -> None:
        end = self.position + count
        if end > self._size:
            raise EOFError
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"a header of more than the {MAX_HEADER_BYTES} bytes supported")
        while len(self._buffer) < end:
            piece = self._stream.read(max(_PIECE, len(self._buffer), end - len(self._buffer)))
            if not piece:
                raise EOFError
            self._buffer += piece


def read_header(cursor: Cursor) -> Header:
    """The header; ``cursor`` is at the end of the magic bytes.

    Raises ``EOFError`` where the file ends inside the header and ``ValueError`` saying what is wrong with it.
    """
    version = cursor.number(GGUFValueType.UINT32)
    if version not in (2, 3):
        hint = ", which is a big-endian file" if version in (2 << 24, 3 << 24) else ""
        raise ValueError(f"version {version}{hint}; supported are the little-endian versions 2 and 3")
    tensor_count = cursor.number(GGUFValueType.UINT64)
    value_count = cursor.number(GGUFValueType.UINT64)
    if tensor_count > MAX_TENSORS or value_count > MAX_KEYS:
        raise ValueError(
            f"{tensor_count} tensors and {value_count} key-values; at most {MAX_TENSORS} and {MAX_KEYS} are supported"
        )
    key_values: dict[str, GgufValue] = {}
    for _ in range(value_count):
        key = cursor.text()
        if not key or key in key_values:
            raise ValueError(f"the key {key!r} twice" if key else "a key without a name")
        try:
            key_values[key] = cursor.value()
        except ValueError as error:
            raise ValueError(f"in key {key!r}: {error}") from None
    tensors: dict[str, TensorEntry] = {}
    for _ in range(tensor_count):
        entry = _entry(cursor)
        if entry.name in tensors:
            raise ValueError(f"the tensor {entry.name!r} twice")
        tensors[entry.name] = entry
    alignment = _alignment(key_values)
    data_start = -(-cursor.position // alignment) * alignment
    return Header(key_values, tuple(tensors.values()), alignment, data_start)


def _entry(cursor: Cursor) -> TensorEntry:
    name = cursor.text()
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"a tensor name of more than {MAX_NAME_BYTES} bytes: {name[:MAX_NAME_BYTES]!r}…")
    count = cursor.number(GGUFValueType.UINT32)
    if count > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {count} dimensions; at most {MAX_DIMENSIONS} are supported")
    # GGUF counts the contiguous axis first.
    shape = tuple(cursor.number(GGUFValueType.UINT64) for _ in range(count))[::-1]
    elements = 1
    for length in shape:
        elements *= max(length, 1)
    if elements >= 2**63:
        raise ValueError(f"tensor {name!r} has the shape {shape}, more than 2^63 elements")
    return TensorEntry(name, shape, cursor.number(GGUFValueType.UINT32), cursor.number(GGUFValueType.UINT64))


def _alignment(key_values: dict[str, GgufValue]) -> int:
    value = key_values.get(Keys.General.ALIGNMENT, GgufValue(GGUFValueType.UINT32, DEFAULT_ALIGNMENT))
    if (
        value.type != GGUFValueType.UINT32
        or not 0 < value.value <= MAX_ALIGNMENT
        or value.value & value.value - 1
    ):
        raise ValueError(
            f"{Keys.General.ALIGNMENT} = {value.value!r} ({value.type.name.lower()}); supported is a power of two "
            f"of at most {MAX_ALIGNMENT} (uint32)"
        )
    return int(value.value)
