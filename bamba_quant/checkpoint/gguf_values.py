"""GGUF's typed values: packed to bytes, and read by key with a check of their type and range.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Strings that are not UTF-8 survive a round trip
as surrogate escapes, since a vocabulary may hold any bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from bamba_quant.errors import CheckpointError, repr_short

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
class GgufValue:
    """A value with its GGUF type; for an array ``item`` is the type of its elements."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None


string = partial(GgufValue, GGUFValueType.STRING)
uint16 = partial(GgufValue, GGUFValueType.UINT16)
uint32 = partial(GgufValue, GGUFValueType.UINT32)
int32 = partial(GgufValue, GGUFValueType.INT32)
float32 = partial(GgufValue, GGUFValueType.FLOAT32)
boolean = partial(GgufValue, GGUFValueType.BOOL)


def array(item: GGUFValueType, values: Sequence[Any]) -> GgufValue:
    return GgufValue(GGUFValueType.ARRAY, list(values), item)


def pack_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: GgufValue) -> bytes:
    """The type tag and the value, as they follow a key."""
    return struct.pack("<I", value.type) + _pack_untagged(value)


def _pack_untagged(value: GgufValue) -> bytes:
    if value.type == GGUFValueType.STRING:
        return pack_string(value.value)
    if value.type != GGUFValueType.ARRAY:
        return np.asarray(value.value, dtype=SCALAR_DTYPES[value.type]).tobytes()
    assert value.item is not None, "an array carries the type of its items"
    head = struct.pack("<IQ", value.item, len(value.value))
    if value.item in SCALAR_DTYPES:
        return head + np.asarray(value.value, dtype=SCALAR_DTYPES[value.item]).tobytes()
    return head + b"".join(map(pack_string, value.value))


class KeyValues(dict[str, GgufValue]):
    """A GGUF's key-values, with one checked getter for each type that llama.cpp reads.

    A getter returns None where the key is missing, and raises ``CheckpointError`` naming ``file``, key and value
    where the value has another type or is out of range.
    """

    def __init__(self, values: dict[str, GgufValue] | None = None, file: Path | None = None) -> None:
        super().__init__(values or {})
        self.file = file

    def text(self, key: str) -> str | None:
        """A string."""
        found: str | None = self._get(key, (GGUFValueType.STRING,))
        return found

    def flag(self, key: str) -> bool | None:
        """A boolean."""
        found: bool | None = self._get(key, (GGUFValueType.BOOL,))
        return found

    def integer(
        self,
        key: str,
        *,
        least: int = 0,
        most: int = 2**32 - 1,
        kind: GGUFValueType = GGUFValueType.UINT32,
    ) -> int | None:
        """An integer from ``least`` to ``most``."""
        found: int | None = self._get(key, (kind,), _in_range(least, most))
        return found

    def number(self, key: str) -> float | None:
        """A finite float32."""
        found: float | None = self._get(key, (GGUFValueType.FLOAT32,), ("finite", math.isfinite))
        return found

    def texts(self, key: str, fits: _Fits = ("", None)) -> list[str] | None:
        """An array of strings; ``fits`` describes and tests each."""
        found: list[str] | None = self._get(key, (GGUFValueType.STRING,), fits, array=True)
        return found

    def integers(
        self,
        key: str,
        *,
        least: int = 0,
        most: int = 2**32 - 1,
        kinds: tuple[GGUFValueType, ...] = (GGUFValueType.UINT32, GGUFValueType.INT32),
    ) -> list[int] | None:
        """An array of integers, each from ``least`` to ``most``; by default of 32 bits."""
        found: list[int] | None = self._get(key, kinds, _in_range(least, most), array=True)
        return found

    def numbers(self, key: str) -> list[float] | None:
        """An array of finite float32, or of integers of 32 bits."""
        kinds = (GGUFValueType.FLOAT32, GGUFValueType.INT32)
        found: list[float] | None = self._get(key, kinds, ("finite", math.isfinite), array=True)
        return found

    def is_array(self, key: str) -> bool:
        """Whether the key is there and holds an array."""
        return key in self and self[key].type == GGUFValueType.ARRAY

    def _get(
        self, key: str, kinds: tuple[GGUFValueType, ...], fits: _Fits = ("", None), *, array: bool = False
    ) -> Any:
        if key not in self:
            return None
        value = self[key]
        named, test = fits
        found = ""
        if self.is_array(key) != array or (value.item if array else value.type) not in kinds:
            found = repr_short(value.value)
        elif test is not None and array and not all(map(test, value.value)):
            index, item = next((i, item) for i, item in enumerate(value.value) if not test(item))
            found = f"{repr_short(item)} at {index}"
        elif test is not None and not array and not test(value.value):
            found = repr_short(value.value)
        if found:
            types = " or ".join(each.name.lower() for each in kinds)
            raise CheckpointError(
                f"the GGUF key {key} has an invalid value",
                where=self.file,
                found=f"{found} ({_type_name(value)})",
                expected=f"{'an array of ' if array else ''}{types}{named and f', {named}'}",
                fix="fetch the file again, or convert the original checkpoint again",
            )
        return value.value


_Fits = tuple[str, Callable[[Any], bool] | None]


def _in_range(least: int, most: int) -> _Fits:
    return f"from {least} to {most}", lambda number: least <= number <= most


def _type_name(value: GgufValue) -> str:
    item = "" if value.item is None else f" of {value.item.name.lower()}"
    return f"{value.type.name.lower()}{item}"
