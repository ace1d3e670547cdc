"""Chooses the version of a quantizer: numpy, which defines the bytes, or compiled, which writes the same ones."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.base import F32, U8, Format, Quantize
from bamba_quant.errors import FormatError


def quantizer(number_format: Format, compiled: bool = True) -> Quantize:
    """The quantizer of a format, with ``Format.quantize``'s contract and its bytes.

    The compiled version runs without the interpreter lock, so that several threads can quantize different rows at
    the same time; ``compiled=False`` gives the numpy version, which defines the bytes. Raises ``FormatError`` for a
    format that is only read, and in the quantizer for arrays that do not fit the format.
    """
    if not number_format.writable:
        raise FormatError(f"{number_format.name} can be read and not written", fix="choose a writable format")
    quantize = number_format.quantize
    if compiled:
        from bamba_quant.codecs import cpu

        quantize = cpu.quantizer(number_format)

    def checked(x: F32, importance: F32 | None = None) -> U8:
        _check(number_format, x, importance)
        return quantize(x, importance)

    return checked


def refining(number_format: Format, quantize: Quantize) -> Quantize:
    """``quantize``, and then a longer search for the scales, on the CPU; as it is where a format has none to move."""
    from bamba_quant.codecs.cpu.refinement import refinable, refine

    if not refinable(number_format):
        return quantize

    def refined(x: F32, importance: F32 | None = None) -> U8:
        return refine(number_format, quantize(x, importance), x, importance)

    return refined


def _check(number_format: Format, x: F32, importance: F32 | None) -> None:
    if x.ndim != 2 or x.dtype != np.float32:
        raise FormatError(
            f"{number_format.name} quantizes rows of float32",
            found=f"{x.dtype} of shape {x.shape}",
            expected="float32 of shape (rows, columns)",
        )
    number_format.row_bytes(x.shape[1])
    if importance is not None and (importance.shape != x.shape[1:] or importance.dtype != np.float32):
        raise FormatError(
            "importance does not fit the rows it weighs",
            found=f"{importance.dtype} of shape {importance.shape}",
            expected=f"float32 of shape ({x.shape[1]},)",
        )
