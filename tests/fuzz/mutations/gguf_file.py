"""A GGUF file as plain lists that can be packed again, also with counts, types and offsets that are wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass(frozen=True)
class Items:
    """An array: the tag of its items, these, and how many it says it has."""

    tag: int
    items: tuple[Any, ...]
    count: int | None = None


@dataclass(frozen=True)
class Literal:
    """The bytes of a value, as they are."""

    raw: bytes


@dataclass(frozen=True)
class Info:
    """An entry of a tensor: ``dims`` as the file has them, the contiguous axis first."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """``values`` are (key, tag, value); counts that are not None are written instead of the real ones."""

    version: int
    values: tuple[tuple[bytes, int, Any], ...]
    tensors: tuple[Info, ...]
    data: bytes
    tensor_count: int | None = None
    value_count: int | None = None
    magic: bytes = b"GGUF"
    alignment: int = field(default=ALIGNMENT)


@lru_cache(64)
def parsed(raw: bytes) -> Gguf:
    """The lists of a valid file. Raises ``struct.error``, ``IndexError`` or ``ValueError`` for another."""
    version, tensor_count, value_count = struct.unpack_from("<IQQ", raw, 4)
    at = 24
    values = []
    for _ in range(min(value_count, 10_000)):
        key, at = _string(raw, at)
        (tag,) = struct.unpack_from("<I", raw, at)
        value, at = _value(raw, at + 4, tag)
        values.append((key, tag, value))
    tensors = []
    for _ in range(min(tensor_count, 10_000)):
        name, at = _string(raw, at)
        (count,) = struct.unpack_from("<I", raw, at)
        if count > 64:
            raise ValueError("dimensions")
        dims = struct.unpack_from(f"<{count}Q", raw, at + 4)
        kind, offset = struct.unpack_from("<IQ", raw, at + 4 + 8 * count)
        tensors.append(Info(name, dims, kind, offset))
        at += 16 + 8 * count
    return Gguf(version, tuple(values), tuple(tensors), raw[at + -at % ALIGNMENT :])


def _string(raw: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", raw, at)
    if at + 8 + length > len(raw):
        raise ValueError("a string beyond the end")
    return raw[at + 8 : at + 8 + length], at + 8 + length


def _value(raw: bytes, at: int, tag: int) -> tuple[Any, int]:
    if tag in SCALARS:
        return struct.unpack_from("<" + SCALARS[tag], raw, at)[0], at + struct.calcsize(SCALARS[tag])
    if tag == STRING:
        return _string(raw, at)
    if tag != ARRAY:
        raise ValueError("a tag")
    item, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if count > len(raw):
        raise ValueError("a count")
    if item in SCALARS:
        code = f"<{count}{SCALARS[item]}"
        return Items(item, struct.unpack_from(code, raw, at)), at + struct.calcsize(code)
    items = []
    for _ in range(count):
        value, at = _value(raw, at, item)
        items.append(value)
    return Items(item, tuple(items)), at


def packed(file: Gguf) -> bytes:
    """The file's bytes. Numbers that their type cannot hold wrap around."""
    count = len(file.tensors) if file.tensor_count is None else file.tensor_count
    values = len(file.values) if file.value_count is None else file.value_count
    parts = [file.magic, struct.pack("<IQQ", file.version % 2**32, count % 2**64, values % 2**64)]
    for key, tag, value in file.values:
        parts += (_pack_string(key), struct.pack("<I", tag % 2**32), _pack(tag, value))
    for info in file.tensors:
        dims = struct.pack(f"<{len(info.dims)}Q", *(length % 2**64 for length in info.dims))
        parts += (_pack_string(info.name), struct.pack("<I", len(info.dims)), dims)
        parts.append(struct.pack("<IQ", info.type % 2**32, info.offset % 2**64))
    header = b"".join(parts)
    return header + bytes(-len(header) % max(1, file.alignment)) + file.data


def _pack_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pack(tag: int, value: Any) -> bytes:
    if isinstance(value, Literal):
        return value.raw
    if isinstance(value, Items):
        count = len(value.items) if value.count is None else value.count
        head = struct.pack("<IQ", value.tag % 2**32, count % 2**64)
        if value.tag in SCALARS:
            return head + b"".join(_pack_scalar(value.tag, item) for item in value.items)
        return head + b"".join(_pack(value.tag, item) for item in value.items)
    if isinstance(value, bytes):
        return _pack_string(value)
    return _pack_scalar(tag, value)


def _pack_scalar(tag: int, value: Any) -> bytes:
    """A number in the form of ``tag``, or as 32 bits where there is no such form."""
    if not isinstance(value, int | float):  # a string or an array under the tag of a number
        return b"\1\2\3\4"
    code = SCALARS.get(tag, "I")
    if code in "fd":
        return struct.pack("<" + code, float(value) if abs(value) < 3e38 or value != value else float("inf"))
    if code == "?":
        return bytes([int(value) % 256 if value == value and abs(value) < 1e300 else 1])
    number = int(value) if value == value and abs(value) < 1e300 else 0
    bits = 8 * struct.calcsize(code)
    return (number % 2**bits).to_bytes(bits // 8, "little")
