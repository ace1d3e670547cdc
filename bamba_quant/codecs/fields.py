"""Codes, scales and minima of a quantized matrix as arrays, and one formula that says what they stand for.

Every format of blocks is w = d·sc·value(code) - low with low = dmin·mn: sc and mn are integers of a group of weights
(1 where a format has none), d and dmin floats of a block, and value(code) is the code itself or an entry of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, U8, Bytes
from bamba_quant.codecs.layout import from_blocks, to_blocks

Integers = NDArray[Any]  # int8, or uint8 where codes index a table
Floats = NDArray[Any]  # in the type that the file stores them in, so that nothing is lost


@dataclass(frozen=True)
class Fields:
    """What the bytes of some rows hold: (rows, columns), (rows, groups) or (rows, blocks) each.

    Without ``dmin`` minima are multiples of d (integer zero points); without ``minima`` dmin counts once.
    """

    codes: Integers
    d: Floats
    scales: Integers | None = None
    dmin: Floats | None = None
    minima: Integers | None = None


@dataclass(frozen=True)
class FieldLayout:
    """How rows of bytes and ``Fields`` become each other, without loss either way, and the grid the fields lie on.

    ``block`` weights share d, ``group`` of them a scale. ``codes``, ``scales`` and ``minima`` are the least and the
    greatest integer that the bytes can hold. ``table`` gives each code's value, indexed by code, NaN for codes without
    a value. ``rounded`` is the plain type ("f32", "bf16", "f16") to which a loader rounds each weight. Scales of
    ``refinable`` blocks can be searched further, since d is float16. ``unpack`` takes uint8 (rows, row_bytes); ``pack``
    returns it.
    """

    block: int
    group: int
    codes: tuple[int, int]
    unpack: Callable[[U8], Fields]
    pack: Callable[[Fields], U8]
    scales: tuple[int, int] | None = None
    minima: tuple[int, int] | None = None
    table: F32 | None = None
    rounded: str = "f32"
    refinable: bool = False

    def values(self, codes: Integers) -> F32:
        """The float32 that each code stands for before scales, in any shape."""
        return codes.astype(np.float32) if self.table is None else self.table[codes]

    def scaling(self, fields: Fields) -> tuple[F32, F32 | None]:
        """Step and low of each group, float32 (rows, groups): w = step·value(code) - low, None where low is 0."""
        each = self.block // self.group
        d = np.repeat(fields.d.astype(np.float32), each, axis=1)
        step = d if fields.scales is None else d * fields.scales.astype(np.float32)
        if fields.dmin is None and fields.minima is None:
            return step, None
        low = d if fields.dmin is None else np.repeat(fields.dmin.astype(np.float32), each, axis=1)
        return step, low if fields.minima is None else low * fields.minima.astype(np.float32)


@dataclass(frozen=True)
class BlockFields(Fields):
    """``Fields`` of n blocks side by side: ``codes`` (block, n), ``scales`` and ``minima`` (groups, n), d (n,)."""


@dataclass(frozen=True)
class BlockLayout:
    """ggml's blocks: ``split`` takes bytes (block_bytes, n_blocks) apart and ``join`` puts them together again.

    The other entries are ``FieldLayout``'s.
    """

    block: int
    block_bytes: int
    group: int
    codes: tuple[int, int]
    split: Callable[[Bytes], BlockFields]
    join: Callable[[BlockFields], Bytes]
    scales: tuple[int, int] | None = None
    minima: tuple[int, int] | None = None
    table: F32 | None = None

    def dequantize(self, raw: U8) -> F32:
        """``Format.dequantize``: the formula on blocks side by side."""
        parts = self.split(to_blocks(raw, self.block_bytes))
        codes = parts.codes.astype(np.float32) if self.table is None else self.table[parts.codes]
        d = parts.d.astype(np.float32)
        step = d[None] if parts.scales is None else d * parts.scales.astype(np.float32)  # (groups, n)
        weights = step[:, None] * codes.reshape(len(step), -1, len(d))
        if parts.dmin is not None:
            low = parts.dmin.astype(np.float32)[None]
            weights -= (low if parts.minima is None else low * parts.minima.astype(np.float32))[:, None]
        return from_blocks(raw.shape[1] // self.block_bytes, weights.reshape(self.block, -1))

    def rows(self) -> FieldLayout:
        """The same of whole rows."""

        def unpack(raw: U8) -> Fields:
            per_row = raw.shape[1] // self.block_bytes
            parts = self.split(to_blocks(raw, self.block_bytes))
            return Fields(**{name: _of_rows(part, per_row) for name, part in _there(parts)})

        def pack(fields: Fields) -> U8:
            per_row = fields.d.shape[1]
            parts = {name: _of_blocks(part, per_row) for name, part in _there(fields)}
            flat = {name: part[0] if name in ("d", "dmin") else part for name, part in parts.items()}
            return from_blocks(per_row, self.join(BlockFields(**flat)))

        return FieldLayout(
            self.block, self.group, self.codes, unpack, pack, self.scales, self.minima, self.table,
            refinable=self.split(np.zeros((self.block_bytes, 1), np.uint8)).d.dtype == np.float16,
        )  # fmt: skip


def given(part: NDArray[Any] | None) -> NDArray[Any]:
    """A field that the format has."""
    assert part is not None
    return part


def _there(fields: Fields) -> list[tuple[str, NDArray[Any]]]:
    return [(name, part) for name, part in vars(fields).items() if part is not None]


def _of_rows(part: NDArray[Any], per_row: int) -> NDArray[Any]:
    """(size, n_blocks) or (n_blocks,) to (rows, per_row · size)."""
    return from_blocks(per_row, part.reshape(-1, part.shape[-1]))


def _of_blocks(part: NDArray[Any], per_row: int) -> NDArray[Any]:
    """The inverse of ``_of_rows``: (size, n_blocks)."""
    return to_blocks(part, part.shape[1] // per_row)
