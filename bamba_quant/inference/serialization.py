"""Values as bytes that another process reads: JSON for plain values, raw bytes for arrays; reading them runs no code.

Layout: uint64 length of the JSON text, the JSON text, then the bytes of each array and byte string, in the order in
which the text names them. Values of None, bool, int, str, list and finite float are JSON's own. Every other value is
an object with one key, its kind: {"tuple": [...]}, {"dict": {...}}, {"float": the 16 hexadecimal digits of a NaN or
infinity}, {"bytes": length}, {"array": [dtype, shape]}, {"record": [class name, {field: value}]}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_LENGTH = struct.Struct("<Q")
# Booleans, integers, floats and complex numbers, which are nothing but their bytes.
_DTYPE = re.compile(r"[<|][biufc](1|2|4|8|16)")
_MOST_AXES = 32


class SerializationError(ValueError):
    """Bytes that are not an encoded value."""


def encode(value: Any, records: Collection[type] = ()) -> bytes:
    """``value`` as bytes; ``records`` are the dataclasses that may occur in it. Raises ``TypeError`` for others."""
    blobs: list[bytes] = []
    names = {kind: kind.__name__ for kind in records}
    text = json.dumps(
        _json_value(value, names, blobs), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    head = text.encode("utf-8", "surrogatepass")  # file names may hold any bytes
    return b"".join((_LENGTH.pack(len(head)), head, *blobs))


def decode(raw: bytes, records: Collection[type] = ()) -> Any:
    """The value of ``raw``, bit for bit what was encoded. Raises ``SerializationError`` for other bytes."""
    try:
        (length,) = _LENGTH.unpack_from(raw)
        start = _LENGTH.size + length
        if start > len(raw):
            raise SerializationError("the value is truncated")
        tree = json.loads(raw[_LENGTH.size : start].decode("utf-8", "surrogatepass"), parse_constant=_refuse)
        reader = _Reader(memoryview(raw)[start:], {kind.__name__: kind for kind in records})
        value = reader.value(tree)
        if len(reader.blobs):
            raise SerializationError(f"{len(reader.blobs)} bytes follow the value")
        return value
    except SerializationError:
        raise
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise SerializationError(str(error) or type(error).__name__) from error


def _json_value(value: Any, names: Mapping[type, str], blobs: list[bytes]) -> Any:
    """``value`` as what JSON can say; its arrays and byte strings are added to ``blobs``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, list):
        return [_json_value(each, names, blobs) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_json_value(each, names, blobs) for each in value]}
    if isinstance(value, bytes):
        blobs.append(value)
        return {"bytes": len(value)}
    if isinstance(value, np.ndarray):
        values = value.astype(value.dtype.newbyteorder("<"), order="C", copy=False)
        if not _DTYPE.fullmatch(values.dtype.str):
            raise TypeError(f"arrays of {value.dtype} cannot be sent to another process")
        blobs.append(values.tobytes())
        return {"array": [values.dtype.str, list(values.shape)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _json_value(each, names, blobs) for key, each in value.items()}}
    if type(value) in names:
        fields = {
            field.name: _json_value(getattr(value, field.name), names, blobs)
            for field in dataclasses.fields(value)
        }
        return {"record": [names[type(value)], fields]}
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


class _Reader:
    """Makes values of JSON trees; ``blobs`` are the bytes that no array has taken yet."""

    def __init__(self, blobs: memoryview, records: Mapping[str, type]) -> None:
        self.blobs = blobs
        self._records = records

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(each) for each in tree]
        if not isinstance(tree, dict):
            return tree
        ((kind, found),) = tree.items()
        if kind == "tuple":
            return tuple(self.value(each) for each in _a(list, found))
        if kind == "dict":
            return {key: self.value(each) for key, each in _a(dict, found).items()}
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(_a(str, found)))[0]
        if kind == "bytes":
            return bytes(self._take(_a(int, found)))
        if kind == "array":
            return self._array(*_a(list, found))
        if kind == "record":
            return self._record(*_a(list, found))
        raise SerializationError(f"unknown kind of value {kind[:20]!r}")

    def _array(self, dtype: Any, shape: Any) -> Any:
        if not _DTYPE.fullmatch(_a(str, dtype)) or len(_a(list, shape)) > _MOST_AXES:
            raise SerializationError("not the dtype and shape of an array")
        sizes = [_a(int, size) for size in shape]
        if any(size < 0 for size in sizes):
            raise SerializationError("an axis of an array has a negative length")
        kind = np.dtype(dtype)
        raw = self._take(math.prod(sizes) * kind.itemsize)
        return np.frombuffer(bytearray(raw), kind).reshape(sizes)  # a copy, so that it can be written to

    def _record(self, name: Any, fields: Any) -> Any:
        kind: Any = self._records[_a(str, name)]
        if [field.name for field in dataclasses.fields(kind)] != list(_a(dict, fields)):
            raise SerializationError(f"the fields of {name} are not those of this version")
        return kind(**{key: self.value(each) for key, each in fields.items()})

    def _take(self, length: int) -> memoryview:
        if not 0 <= length <= len(self.blobs):
            raise SerializationError("an array is larger than the value that holds it")
        taken, self.blobs = self.blobs[:length], self.blobs[length:]
        return taken


def _a(kind: type, found: Any) -> Any:
    if type(found) is not kind:
        raise SerializationError(f"{type(found).__name__} instead of {kind.__name__}")
    return found


def _refuse(constant: str) -> None:
    raise SerializationError(f"{constant} is not a JSON number")
