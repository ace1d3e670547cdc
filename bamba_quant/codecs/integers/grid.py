"""Groups of a row as integers with one scale each: their values, and how they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import nearest_clipped
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.errors import FormatError

Zero = Literal["none", "integer", "float"]


@dataclass(frozen=True)
class IntegerGrid:
    """The numbers a group can hold: scale·q, scale·(q - zero) for an integer zero, scale·q + zero for a float one.

    ``bits`` is 4 or 8, q goes from -2^(bits-1) to 2^(bits-1) - 1, as does an integer zero; a float zero is a
    bfloat16. ``group`` is the number of neighbouring columns that share a scale.
    """

    bits: int
    zero: Zero
    group: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.zero not in get_args(Zero) or self.group % 32:
            raise FormatError(
                "unsupported integers",
                found=f"{self.bits} bits, zero {self.zero!r}, groups of {self.group}",
                expected=f"4 or 8 bits, zero one of {', '.join(get_args(Zero))}, groups of a multiple of 32",
            )

    @property
    def low(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        return (1 << self.bits - 1) - 1

    def codes(self, x: F32, scale: F32, zero: F32) -> F32:
        """The nearest integers (n, groups), as float32, each quotient rounded as compressed-tensors rounds it."""
        if self.zero == "float":
            return nearest_clipped((x - zero) / scale, self.low, self.high)
        if self.zero == "integer":
            return nearest_clipped(x / scale + zero, self.low, self.high)
        return nearest_clipped(x / scale, self.low, self.high)

    def values(self, q: F32, scale: F32, zero: F32) -> F32:
        """The values of integers, float32."""
        if self.zero == "float":
            return scale * q + zero
        if self.zero == "integer":
            return scale * (q - zero)
        return scale * q


@dataclass(frozen=True)
class Groups:
    """Rows quantized: ``codes`` int8 (rows, columns); ``scale`` and ``zero`` float32 (rows, columns / group).

    Scales, and zeros of kind "float", are bfloat16 numbers; zeros of kind "integer" are whole.
    """

    codes: NDArray[np.int8]
    scale: F32
    zero: F32


def dequantize(grid: IntegerGrid, groups: Groups) -> F32:
    """The values of ``groups``, float32 (rows, columns), before a loader rounds them."""
    rows, columns = groups.codes.shape
    q = groups.codes.reshape(rows, -1, grid.group).astype(np.float32)
    return grid.values(q, groups.scale[..., None], groups.zero[..., None]).reshape(rows, columns)


def check_columns(grid: IntegerGrid, columns: int) -> None:
    """Raise ``FormatError`` when groups do not fill a row."""
    if columns % grid.group:
        raise FormatError(
            "a row does not divide into groups",
            found=f"{columns} columns",
            expected=f"a multiple of {grid.group}",
        )


def pack(codes: NDArray[np.int8], bits: int, offset: int) -> U8:
    """Integers plus ``offset`` modulo 2^bits, (rows, n) to (rows, n·bits/8): the first nibble is the low one."""
    unsigned = (codes.view(np.uint8) + np.uint8(offset)) & np.uint8((1 << bits) - 1)
    if bits == 8:
        return unsigned
    packed: U8 = unsigned[:, ::2] | unsigned[:, 1::2] << np.uint8(4)
    return packed


def unpack(packed: U8, bits: int, offset: int) -> NDArray[np.int8]:
    """The inverse of ``pack`` for integers of [-2^(bits-1), 2^(bits-1))."""
    unsigned: Any = packed
    if bits == 4:
        unsigned = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), 2 * packed.shape[1])
    # Shifting the offset's bits to the top and back extends the sign.
    top = 8 - bits
    shifted = (unsigned - np.uint8(offset)) << top
    codes: NDArray[np.int8] = shifted.view(np.int8) >> np.int8(top)
    return codes
