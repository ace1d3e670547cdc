"""How the codes, scales and zeros of some rows become weights: in numpy, and in torch on any device to the same bits.

Every value is computed in float32 and rounded once, to the dtype in which a loader of the checkpoint computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import PackedRows
from bamba_quant.codecs.fields import FieldLayout, Fields
from bamba_quant.codecs.floats import to_bfloat16, to_float32
from bamba_quant.codecs.fp4 import VALUES as _E2M1_VALUES
from bamba_quant.codecs.integers.grid import IntegerGrid, pack, unpack
from bamba_quant.codecs.integers.torchao_tiles import TILE, pack_tiles, unpack_tiles, unpack_tiles_on

if TYPE_CHECKING:
    import torch

# Every e4m3 code's value.
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Dequantizer(ABC):
    """Codes uint8 (r, bytes), scales (r, s) and zeros (r, z), float32, to weights float32 (r, columns)."""

    @abstractmethod
    def values(self, codes: U8, scale: F32, zero: F32) -> F32:
        """The definition, in numpy."""

    @abstractmethod
    def values_on(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The same of tensors, where they lie."""

    @abstractmethod
    def fields(self, code_bytes: int, scales: int) -> FieldLayout:
        """Codes and scales of rows that hold ``code_bytes`` of codes, then so many float32 scales, then zeros."""

    @abstractmethod
    def packed(self, code_bytes: int, scales: int) -> PackedRows:
        """The table of such rows for compiled kernels."""


@dataclass(frozen=True)
class Float8Dequantizer(Dequantizer):
    """e4m3 codes times scales, one for each ``width`` of ``columns`` columns, rounded to ``dtype``."""

    columns: int
    width: int
    dtype: str

    def values(self, codes: U8, scale: F32, zero: F32) -> F32:
        values: F32 = _E4M3_VALUES[codes]
        if self.width < self.columns:
            scale = np.repeat(scale, self.width, axis=1)[:, : self.columns]
        values *= scale
        return _rounded(values, self.dtype)

    def values_on(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        import torch

        values = codes.view(torch.float8_e4m3fn).float()
        if self.width < self.columns:
            scale = scale.repeat_interleave(self.width, dim=1)[:, : self.columns]
        values *= scale
        return _rounded_on(values, self.dtype)

    def fields(self, code_bytes: int, scales: int) -> FieldLayout:
        def split(codes: U8, scale: F32, zero: F32) -> Fields:
            return Fields(codes, scale)

        def join(fields: Fields) -> tuple[NDArray[Any], ...]:
            return fields.codes, fields.d

        unpack_row, pack_row = _row_unpack_and_pack(code_bytes, scales, split, join)
        return FieldLayout(
            self.width, self.width, (0, 255), unpack_row, pack_row, table=_E4M3_VALUES, rounded=self.dtype
        )

    def packed(self, code_bytes: int, scales: int) -> PackedRows:
        return PackedRows("e4m3", 8, 0, self.dtype, self.width, code_bytes, code_bytes + 4 * scales)


@dataclass(frozen=True)
class Float4Dequantizer(Dequantizer):
    """e2m1 codes in pairs, the first in the low nibble, times steps of ``width`` columns, rounded to bfloat16."""

    width: int

    def values(self, codes: U8, scale: F32, zero: F32) -> F32:
        return _rounded(_E2M1_VALUES[_nibbles(codes)] * np.repeat(scale, self.width, axis=1), "bf16")

    def values_on(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        import torch

        values = torch.from_numpy(_E2M1_VALUES).to(codes.device)[_unpack_on(codes, 4, 0).long() & 15]
        return _rounded_on(values * scale.repeat_interleave(self.width, dim=1), "bf16")

    def fields(self, code_bytes: int, scales: int) -> FieldLayout:
        def split(codes: U8, scale: F32, zero: F32) -> Fields:
            return Fields(_nibbles(codes), scale)

        def join(fields: Fields) -> tuple[NDArray[Any], ...]:
            return pack(fields.codes.view(np.int8), 4, 0), fields.d

        unpack_row, pack_row = _row_unpack_and_pack(code_bytes, scales, split, join)
        return FieldLayout(
            self.width, self.width, (0, 15), unpack_row, pack_row, table=_E2M1_VALUES, rounded="bf16"
        )

    def packed(self, code_bytes: int, scales: int) -> PackedRows:
        return PackedRows("e2m1", 4, 0, "bf16", self.width, code_bytes, code_bytes + 4 * scales)


@dataclass(frozen=True)
class IntegerDequantizer(Dequantizer):
    """What a ``IntegerGrid`` says integers stored with ``offset`` stand for, rounded to ``dtype``.

    Scales and zeros of columns that only pad a row may follow those of the row.
    """

    grid: IntegerGrid
    offset: int
    columns: int
    dtype: str

    def values(self, codes: U8, scale: F32, zero: F32) -> F32:
        groups = self.columns // self.grid.group
        q = unpack(codes, self.grid.bits, self.offset)[:, : self.columns]
        grouped = q.reshape(len(codes), groups, self.grid.group).astype(np.float32)
        values = self.grid.values(grouped, scale[:, :groups, None], zero[:, :groups, None])
        return _rounded(values.reshape(len(codes), self.columns), self.dtype)

    def values_on(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        groups = self.columns // self.grid.group
        q = _unpack_on(codes, self.grid.bits, self.offset)[:, : self.columns]
        grouped = q.reshape(len(codes), groups, self.grid.group).float()
        # Operation by operation as numpy's: a product is rounded before a zero is added to it.
        values = self.grid.values(grouped, scale[:, :groups, None], zero[:, :groups, None])
        return _rounded_on(values.reshape(len(codes), self.columns), self.dtype)

    def fields(self, code_bytes: int, scales: int) -> FieldLayout:
        grid, whole = self.grid, (self.grid.low, self.grid.high)

        def split(codes: U8, scale: F32, zero: F32) -> Fields:
            q = unpack(codes, grid.bits, self.offset)
            if grid.zero == "none":
                return Fields(q, scale)
            return (
                Fields(q, scale, dmin=-zero)
                if grid.zero == "float"
                else Fields(q, scale, minima=zero.astype(np.int8))
            )

        def join(fields: Fields) -> tuple[NDArray[Any], ...]:
            zeros = [
                part
                for part in (None if fields.dmin is None else -fields.dmin, fields.minima)
                if part is not None
            ]
            return pack(fields.codes, grid.bits, self.offset), fields.d, *zeros

        unpack_row, pack_row = _row_unpack_and_pack(code_bytes, scales, split, join)
        minima = whole if grid.zero == "integer" else None
        return FieldLayout(
            grid.group, grid.group, whole, unpack_row, pack_row, minima=minima, rounded=self.dtype
        )

    def packed(self, code_bytes: int, scales: int) -> PackedRows:
        kind, zeros_at = f"integers, zero {self.grid.zero}", code_bytes + 4 * scales
        return PackedRows(
            kind, self.grid.bits, self.offset, self.dtype, self.grid.group, code_bytes, zeros_at
        )


@dataclass(frozen=True)
class TorchaoTiles:
    """torchao's tiles of eight rows, whose first ``columns`` columns become rows of nibbles in two's complement.

    Codes are uint8 (n, bytes) as they are stored, and (n·8, row_bytes) in the order of rows.
    """

    columns: int

    def rows(self, stored: U8) -> U8:
        """The definition, in numpy."""
        words = stored.view(np.int32).reshape(len(stored), -1, 4 * TILE, 4)
        return pack(np.ascontiguousarray(unpack_tiles(words)[:, : self.columns]), 4, 0)

    def stored(self, rows: U8, before: U8) -> U8:
        """The inverse of ``rows``; padding is as it was in ``before`` (n, bytes)."""
        codes = unpack_tiles(before.view(np.int32).reshape(len(before), -1, 4 * TILE, 4))
        codes[: len(rows), : self.columns] = unpack(np.ascontiguousarray(rows), 4, 0)
        return pack_tiles(codes).view(np.uint8).reshape(before.shape)

    def rows_on(self, stored: torch.Tensor) -> torch.Tensor:
        """``rows`` of a tensor, on its device."""
        import torch

        words = stored.view(torch.int32).view(len(stored), -1, 4 * TILE, 4)
        nibbles = unpack_tiles_on(words)[:, : self.columns].view(torch.uint8) & 15
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def _row_unpack_and_pack(
    code_bytes: int,
    scales: int,
    split: Callable[[U8, F32, F32], Fields],
    join: Callable[[Fields], tuple[NDArray[Any], ...]],
) -> tuple[Callable[[U8], Fields], Callable[[Fields], U8]]:
    """``unpack`` and ``pack`` of rows that hold codes, then scales and zeros in float32."""

    def unpack_rows(raw: U8) -> Fields:
        numbers = np.ascontiguousarray(raw[:, code_bytes:]).view(np.float32)
        return split(np.ascontiguousarray(raw[:, :code_bytes]), numbers[:, :scales], numbers[:, scales:])

    def pack_rows(fields: Fields) -> U8:
        codes, *numbers = join(fields)
        parts = [np.ascontiguousarray(part, np.float32).view(np.uint8) for part in numbers]
        return np.concatenate((codes.view(np.uint8), *parts), axis=1)

    return unpack_rows, pack_rows


def _nibbles(packed: U8) -> U8:
    return unpack(packed, 4, 0).view(np.uint8) & np.uint8(15)


def _unpack_on(packed: torch.Tensor, bits: int, offset: int) -> torch.Tensor:
    """``formats.integers.unpack``: int8 (rows, 8·bytes/bits)."""
    import torch

    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    top = 8 - bits
    return ((packed - offset) << top).view(torch.int8) >> top


def _rounded(values: F32, dtype: str) -> F32:
    if dtype == "bf16":
        return to_float32(to_bfloat16(values))
    return values.astype(np.float16).astype(np.float32) if dtype == "f16" else values


def _rounded_on(values: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "bf16":
        return values.bfloat16().float()
    return values.half().float() if dtype == "f16" else values
