"""What a codec is: the parts that a matrix becomes, the methods that fill them, and how a file names them.

Two kinds share this: ``BlockCodec``, ggml's formats, whose one part is rows of packed blocks, and ``SafetensorsCodec``,
whose parts are tensors of a safetensors directory. Methods work on chunks of rows that are independent of each other;
what a whole matrix, or several fused matrices, must share is measured before, in a pass over all chunks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bamba_quant.codecs.arrays import F32, U8, Array
from bamba_quant.errors import FormatError, did_you_mean

# numpy's dtype by the name in a safetensors header.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}

Parts = Mapping[str, Array]
Shared = Any
Encode = Callable[[F32, "F32 | None", Shared], Parts]
Measure = Callable[[F32, "F32 | None"], Array]
Quantize = Callable[[F32, "F32 | None"], U8]


@dataclass(frozen=True)
class Part:
    """One tensor that a matrix becomes: its name is the module's with ``suffix``, as in ``.weight_scale``.

    ``dtype`` is a key of ``DTYPES``. One index along ``axis`` covers ``rows`` rows of the matrix, the last one
    perhaps fewer; ``rows`` 0 marks a part that is not cut by rows and is written once.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    rows: int = 1
    axis: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The indices along ``axis`` that rows ``start`` to ``stop`` of the matrix fill."""
        return start // self.rows, -(-stop // self.rows)


@dataclass(frozen=True)
class Method:
    """One way to choose codes and scales; every method of a codec fills the same layout.

    ``encode(x, importance, shared)`` takes finite float32 of shape (r, columns), r a multiple of the codec's
    ``row_multiple`` or the last rows; importance float32 of shape (columns,) that weighs squared errors, or None; and
    the result of ``share``. It returns the parts that are cut by rows, by suffix, for these rows. It is numpy and
    defines the bytes. ``compiled`` imports a compiled version that writes the same bytes without the interpreter lock.

    Where a whole matrix shares something, ``measure(x, importance)`` gets every chunk first, ``combine`` joins two
    measurements, exactly and in any order, and ``share`` turns the joined one into the ``shared`` of ``encode``.
    Matrices that a runtime fuses are measured together. Without ``measure``, ``shared`` is None. ``weighs`` says
    whether importance changes anything.
    """

    name: str
    about: str
    encode: Encode
    compiled: Callable[[], Encode] | None = None
    measure: Measure | None = None
    compiled_measure: Callable[[], Measure] | None = None
    combine: Callable[[Array, Array], Array] | None = None
    share: Callable[[Array], Shared] | None = None
    weighs: bool = True


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """How a matrix is stored: ``methods`` fill its parts, the default one first; without methods it is only read.

    ``about`` is one line for users. Chunks of rows begin at multiples of ``row_multiple``.
    """

    name: str
    about: str = ""
    methods: tuple[Method, ...] = ()
    row_multiple: int = 1

    @abstractmethod
    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The tensors that a matrix of this shape becomes."""

    @abstractmethod
    def misfit(self, rows: int, columns: int) -> str:
        """The shapes that the codec takes, where this one is not among them; else ""."""

    @property
    def writable(self) -> bool:
        """Whether any method fills its parts."""
        return bool(self.methods)

    @property
    def compiled(self) -> bool:
        """Whether the default method has a compiled version; without one numpy quantizes, more slowly."""
        return not self.methods or self.methods[0].compiled is not None

    def check(self, rows: int, columns: int) -> None:
        """Raise ``FormatError`` when a matrix of this shape does not divide into the codec's blocks."""
        expected = self.misfit(rows, columns)
        if expected:
            raise FormatError(
                f"the matrix does not divide into blocks of {self.name}",
                found=f"{rows} rows of {columns} columns",
                expected=expected,
            )

    def method(self, name: str | None = None) -> Method:
        """The method called ``name``, by default the first. Raises ``FormatError`` that lists the methods."""
        if not self.methods:
            raise FormatError(f"{self.name} can be read but not written", fix="choose a writable type")
        if name is None:
            return self.methods[0]
        known = {method.name: method for method in self.methods}
        if name not in known:
            raise FormatError(
                f"{self.name} has no method called {name!r}{did_you_mean(name, known)}",
                expected="one of " + ", ".join(known),
            )
        return known[name]

    def has_method(self, name: str) -> bool:
        return any(method.name == name for method in self.methods)

    def n_bytes(self, rows: int, columns: int) -> int:
        """Bytes of all parts of a matrix."""
        return sum(part.n_bytes for part in self.parts(rows, columns))
