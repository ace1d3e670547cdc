"""The registry of number formats: each is a frozen record of a block's geometry and two pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.errors import FormatError

if TYPE_CHECKING:
    from bamba_quant.codecs.fields import FieldLayout

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Quantize = Callable[[F32, "F32 | None"], U8]
Dequantize = Callable[[U8], F32]


@dataclass(frozen=True)
class Format:
    """How ``block_size`` neighbours of a row become ``block_bytes`` bytes, and back.

    ``quantize(x, importance)`` takes float32 of shape (rows, n), n a multiple of ``block_size``, and
    optionally importance weights of shape (n,), and returns uint8 of shape (rows, ``row_bytes(n)``); rows
    never see each other. ``dequantize`` is its inverse up to rounding. ``dtype`` is set for formats that
    store plain numbers; ``max_abs`` is a magnitude up to which weights never overflow the block's scale. A
    format that is not ``writable`` can only be read: its ``quantize`` raises ``FormatError``. One that is not
    ``readable`` can only be listed: its ``dequantize`` raises it too. ``fields`` gives codes and scales as arrays.

    ``quantize`` here is the numpy twin, the definition; ``bamba_quant.codecs.dispatch`` has the fast ones. It
    keeps temporaries of several times the input: hand it rows in chunks.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    quantize: Quantize
    dequantize: Dequantize
    dtype: np.dtype[Any] | None = None
    max_abs: float = math.inf
    writable: bool = True
    readable: bool = True
    fields: FieldLayout | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def fits(self, columns: int) -> bool:
        return columns % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` weights. Raises ``FormatError`` when blocks do not fill the row."""
        if not self.fits(columns):
            raise FormatError(
                f"a row does not divide into blocks of {self.name}",
                found=f"{columns} columns",
                expected=f"a multiple of {self.block_size}",
            )
        return columns // self.block_size * self.block_bytes


_registry: dict[str, Format] = {}


def register(number_format: Format) -> Format:
    """Add a format under its name; a second one of the same name is a programming error."""
    if number_format.name in _registry:
        raise ValueError(f"number format {number_format.name} is registered twice")
    _registry[number_format.name] = number_format
    return number_format


def formats() -> tuple[Format, ...]:
    """Every format this build knows, in the order of registration; ``writable`` tells which it can write."""
    return tuple(_registry.values())


def format_named(name: str) -> Format:
    """The format users call ``name``, in any case. Raises ``FormatError`` listing the names there are."""
    try:
        return _registry[name.lower()]
    except KeyError:
        raise FormatError(
            f"no number format is called {name!r}", expected="one of " + ", ".join(_registry)
        ) from None
