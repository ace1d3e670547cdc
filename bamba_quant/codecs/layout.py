"""Where the fields of ggml's blocks lie, as a table for each codec, and numpy's packing and unpacking by it.

``compiled.packing`` makes the functions of compiled kernels of the same tables, ``gpu`` the decoder of a GPU. Blocks
run along the trailing axis here, so that all are packed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import as_bytes, half_bytes
from bamba_quant.codecs.arrays import F32, U8, Bytes
from bamba_quant.codecs.fields import FieldLayout, Fields, Integers

Scalar = TypeVar("Scalar", bound=np.generic)


def to_blocks(rows: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """(rows, n) to contiguous (size, n_blocks)."""
    return np.ascontiguousarray(rows.reshape(-1, size).T)


def broadcast_rows(importance: F32, rows: F32) -> F32:
    """Importance (n,) as it applies to each of the rows, (rows, n)."""
    return np.broadcast_to(importance, rows.shape)


def from_blocks(per_row: int, *parts: NDArray[Any]) -> NDArray[Any]:
    """Parts of shape (size, n_blocks), laid one after the other, to rows of ``per_row`` blocks."""
    together = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(together.T).reshape(-1, per_row * len(together))


def halves(pair: Bytes) -> NDArray[np.float16]:
    """Two bytes of a float16, (2, n_blocks), to (n_blocks,)."""
    return np.ascontiguousarray(pair.T).view("<f2")[:, 0]


def half_powers(e: U8) -> F32:
    """2^(e - 128) in float32, the lowest two as subnormals (``ggml_e8m0_to_fp32_half``, ggml-impl.h:489)."""
    wide = e.astype(np.int32)
    bits = np.where(wide < 2, 0x00200000 << np.minimum(wide, 1), wide - 1 << 23)
    return bits.astype(np.int32).view(np.float32)


def _exponents(d: F32) -> U8:
    """The inverse of ``half_powers``."""
    bits = d.view(np.int32)
    return as_bytes(np.where(bits < 0x00800000, bits >> 22, (bits >> 23) + 1))


@dataclass(frozen=True)
class Bits:
    """``width`` bits, from bit ``low`` on, of ``count`` integers from number ``first`` on, in bytes from ``at`` on.

    Byte i of each ``run`` bytes holds integers i, i + run, i + 2·run, …, ``per_byte`` of them (by default as many as
    fit), the first one at bit ``shift``. Higher bits of an integer are cut off, unless it ``spills``: then they are
    combined with the neighbouring bits by OR, as ggml's code does.
    """

    at: int
    width: int
    count: int
    run: int = 1
    low: int = 0
    first: int = 0
    shift: int = 0
    per_byte: int = field(default=0)
    spills: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_byte", self.per_byte or 8 // self.width)

    @property
    def mask(self) -> int:
        return 255 if self.spills else (1 << self.width) - 1

    @property
    def stored_in(self) -> slice:
        """The bytes of a block that hold them."""
        return slice(self.at, self.at + self.count // self.per_byte)

    @property
    def _runs(self) -> int:
        return self.count // (self.per_byte * self.run)

    @property
    def _shifts(self) -> Bytes:
        return (self.shift + self.width * np.arange(self.per_byte, dtype=np.uint8))[:, None, None]

    def unpack(self, blocks: Bytes) -> Bytes:
        """These bits of blocks (block_bytes, n), as the lowest ones, (count, n)."""
        runs = blocks[self.stored_in].reshape(self._runs, 1, self.run, blocks.shape[1])
        parts = runs >> self._shifts & np.uint8((1 << self.width) - 1)
        return parts.reshape(self.count, blocks.shape[1])

    def pack(self, integers: Bytes, blocks: Bytes) -> None:
        """Put these bits of integers (n_integers, n) into blocks (block_bytes, n), beside the bits that are set."""
        taken = integers[self.first : self.first + self.count] >> np.uint8(self.low) & np.uint8(self.mask)
        parts = taken.reshape(self._runs, self.per_byte, self.run, blocks.shape[1]) << self._shifts
        blocks[self.stored_in] |= np.bitwise_or.reduce(parts, axis=1).reshape(
            self._runs * self.run, blocks.shape[1]
        )


@dataclass(frozen=True)
class Field:
    """Integers of a block by their bits: ``zero`` is added before they are stored, or they are ``signed`` bytes."""

    bits: tuple[Bits, ...]
    zero: int = 0
    signed: bool = False

    @property
    def count(self) -> int:
        return max(bits.first + bits.count for bits in self.bits)

    @property
    def range(self) -> tuple[int, int]:
        """The least and the greatest integer that the bits hold."""
        size = 1 << max(bits.low + bits.width for bits in self.bits)
        zero = size // 2 if self.signed else self.zero
        return -zero, size - 1 - zero

    def unpack(self, blocks: Bytes) -> Integers:
        """Blocks (block_bytes, n) to int8 or, where none is negative, uint8 (count, n)."""
        stored = np.zeros((self.count, blocks.shape[1]), np.uint8)
        for bits in self.bits:
            stored[bits.first : bits.first + bits.count] |= bits.unpack(blocks) << np.uint8(bits.low)
        if self.zero:
            stored -= np.uint8(self.zero)
        return stored.view(np.int8) if self.zero or self.signed else stored

    def pack(self, integers: Integers, blocks: Bytes) -> None:
        """The inverse of ``unpack``, into blocks whose bits of this field are 0."""
        stored = integers.view(np.uint8) + np.uint8(self.zero)
        for bits in self.bits:
            bits.pack(stored, blocks)


@dataclass(frozen=True)
class BlockLayout:
    """ggml's blocks of ``block`` weights in ``block_bytes`` bytes, ``group`` of them under a scale.

    ``d`` and ``dmin`` are the offsets of two float16 numbers, dmin with its sign turned where the block's minimum is
    ``added``; with ``exponent`` d is a power of two in a byte. ``table`` gives each code's value.
    """

    block: int
    block_bytes: int
    group: int
    codes: Field
    d: int
    scales: Field | None = None
    dmin: int | None = None
    minima: Field | None = None
    added: bool = False
    exponent: bool = False
    table: F32 | None = None

    def split(self, blocks: Bytes) -> Fields:
        """What blocks (block_bytes, n) hold: codes (block, n), scales and minima (groups, n), d and dmin (n,)."""
        dmin = None if self.dmin is None else halves(blocks[self.dmin : self.dmin + 2])
        return Fields(
            self.codes.unpack(blocks),
            half_powers(blocks[self.d]) if self.exponent else halves(blocks[self.d : self.d + 2]),
            None if self.scales is None else self.scales.unpack(blocks),
            -dmin if self.added and dmin is not None else dmin,
            None if self.minima is None else self.minima.unpack(blocks),
        )

    def join(self, fields: Fields) -> Bytes:
        """The inverse of ``split``; d and dmin may be float32, which is rounded."""
        blocks = np.zeros((self.block_bytes, len(fields.d)), np.uint8)
        if self.exponent:
            blocks[self.d] = _exponents(fields.d)
        else:
            blocks[self.d : self.d + 2] = half_bytes(fields.d)
        if self.dmin is not None and fields.dmin is not None:
            blocks[self.dmin : self.dmin + 2] = half_bytes(-fields.dmin if self.added else fields.dmin)
        for part, integers in ((self.scales, fields.scales), (self.minima, fields.minima)):
            if part is not None and integers is not None:
                part.pack(integers, blocks)
        self.codes.pack(fields.codes, blocks)
        return blocks

    def packed(self, per_row: int, fields: Fields) -> U8:
        """``fields`` of blocks side by side to rows of ``per_row`` blocks, uint8 (rows, row_bytes)."""
        return from_blocks(per_row, self.join(fields))

    def dequantize(self, raw: U8) -> F32:
        """``BlockCodec.dequantize``: the formula of ``fields`` on blocks side by side."""
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
            return Fields(**{name: _of_rows(part, per_row) for name, part in parts.present()})

        def pack(fields: Fields) -> U8:
            per_row = fields.d.shape[1]
            parts = {name: to_blocks(part, part.shape[1] // per_row) for name, part in fields.present()}
            return self.packed(
                per_row, Fields(**parts | {k: parts[k][0] for k in ("d", "dmin") if k in parts})
            )

        return FieldLayout(
            self.block, self.group, self.codes.range, unpack, pack,
            None if self.scales is None else self.scales.range,
            None if self.minima is None else self.minima.range,
            self.table, refinable=not self.exponent,
        )  # fmt: skip


def _of_rows(part: NDArray[Any], per_row: int) -> NDArray[Any]:
    """(size, n_blocks) or (n_blocks,) to (rows, per_row · size)."""
    return from_blocks(per_row, part.reshape(-1, part.shape[-1]))
