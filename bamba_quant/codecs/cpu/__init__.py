"""The compiled twin of every writable format: one thread's work on a chunk of rows, free of the GIL.

Why numba, with vectors of its own: the search of Q4_K without importance, on one core of a Zen 5, does in
Mweights/s 11 in numpy, 10 in torch with numpy's plan, 66 in C with GCC 12's vector types, 250 here; ggml's
C does 20. An extension would also need a compiler, or a wheel for each platform, where the package is
installed; numba compiles for the processor it runs on. Left alone, LLVM vectorises none of these searches:
inside a block, sums run in order.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import numpy as np

from bamba_quant.codecs.base import F32, U8, Format, Quantize
from bamba_quant.errors import FormatError


@cache
def _kernel_names() -> frozenset[str]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    from bamba_quant.codecs.cpu.compilation import KERNELS

    return frozenset(KERNELS)


def quantizer(number_format: Format) -> Quantize:
    """The compiled twin of a format; compiled or fetched from disk at its first call, for either kind.

    Rows are independent, so any number of threads may quantize chunks of rows at once and the bytes do not
    depend on the chunks. Raises ``FormatError`` for a format without a kernel. Importing numba takes about
    a second.
    """
    if number_format.dtype == np.float32:
        return number_format.quantize  # nothing to compute
    if number_format.name not in _kernel_names():
        raise FormatError(
            f"{number_format.name} has no compiled quantizer",
            expected="one of " + ", ".join(sorted(_kernel_names())),
        )
    from bamba_quant.codecs.cpu.compilation import compiled

    def quantize(x: F32, importance: F32 | None = None) -> U8:
        out = np.empty((len(x), number_format.row_bytes(x.shape[1])), np.uint8)
        x = np.require(x, np.float32, ["C", "A"])
        if importance is not None:
            importance = np.require(np.broadcast_to(importance, x.shape[1:]), np.float32, ["C", "A"])
        compiled(number_format.name, importance is not None)(x, importance, out)
        return out

    return quantize
