"""Chooses who computes a format: numpy, which defines it, or a faster twin that writes the same bytes."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.base import F32, U8, Format, Quantize
from bamba_quant.errors import FormatError

DEVICES = ("auto", "cpu", "cuda", "numpy")


def quantizer(number_format: Format, device: str = "cpu") -> Quantize:
    """The quantizer of a format on a device, with ``Format.quantize``'s contract and its bytes.

    ``device``: "numpy", the definition; "cpu", compiled, for one thread on a chunk of rows, other threads
    free to run it on other rows at the same time; "cuda", one GPU, arrays carried there and back; "auto",
    cuda where torch sees a GPU and cpu elsewhere. Raises ``FormatError`` for a format that is only read,
    for an unknown device, for a device that is not there, and in the quantizer for arrays that do not fit
    the format.
    """
    if not number_format.writable:
        raise FormatError(f"{number_format.name} can be read and not written", fix="choose a writable format")
    if device == "auto":
        device = "cuda" if _cuda_is_there() else "cpu"
    if device == "numpy":
        quantize = number_format.quantize
    elif device == "cpu":
        from bamba_quant.codecs import cpu

        quantize = cpu.quantizer(number_format)
    elif device == "cuda":
        from bamba_quant.codecs import cuda

        quantize = cuda.quantizer(number_format)
    else:
        raise FormatError(
            "no such device quantizes", found=repr(device), expected="one of " + ", ".join(DEVICES)
        )

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


def _cuda_is_there() -> bool:
    import torch

    return bool(torch.cuda.is_available())


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
