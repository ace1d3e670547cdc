"""Codes, scales and minima of a quantized matrix as arrays, and the formula of the weights they encode.

Every format of blocks is w = d·sc·value(code) - low with low = dmin·mn: sc and mn are integers of a group of weights
(1 where a format has none), d and dmin floats of a block, and value(code) is the code itself or an entry of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, U8

Integers = NDArray[Any]  # int8, or uint8 where codes index a table
Floats = NDArray[Any]  # in the type that the file stores them in, so that nothing is lost


@dataclass(frozen=True)
class Fields:
    """What the bytes of some rows hold: (rows, columns), (rows, groups) or (rows, blocks) each.

    Without ``dmin`` minima are multiples of d (integer zero points); without ``minima`` dmin counts once. ``layout``
    has fields of n blocks side by side too: (weights of a block, n), (groups of a block, n) or (n,) each.
    """

    codes: Integers
    d: Floats
    scales: Integers | None = None
    dmin: Floats | None = None
    minima: Integers | None = None

    def present(self) -> list[tuple[str, NDArray[Any]]]:
        """The fields that there are, by name."""
        return [(name, part) for name, part in vars(self).items() if part is not None]


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
        """The float32 value of each code before scaling, in any shape."""
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
