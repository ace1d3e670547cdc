"""The methods of integer codecs: scales, zeros and integers of groups, which a layout makes its parts of."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from bamba_quant.codecs.arrays import F32, U8, Array
from bamba_quant.codecs.base import Encode, Method, Parts, Shared
from bamba_quant.codecs.integers.grid import IntegerGrid, pack
from bamba_quant.codecs.integers.search import quantize
from bamba_quant.errors import FormatError

GROUPS = (128, 64, 32)
MIN_MAX = "the whole range, as compressed-tensors' min-max observer takes it"
_SEARCHES = {
    "hqq": "a search of scales, then scale and integers refitted by least squares",
    "mse": "the clipped range of least squared error",
}


def integer_methods(
    grid: IntegerGrid, offset: int, parts: Callable[[U8, F32, F32], Parts], rtn: str = MIN_MAX
) -> tuple[Method, ...]:
    """The searches and rounding to nearest, which ``rtn`` describes.

    ``parts`` takes the integers as ``integers.grid.pack`` packs them with ``offset``, scales and zeros float32 (rows,
    groups), and returns a codec's parts that are cut by rows.
    """

    def method(name: str, about: str) -> Method:
        def encode(x: F32, importance: F32 | None, shared: Shared) -> Parts:
            groups = quantize(grid, name, x, importance)
            return parts(pack(groups.codes, grid.bits, offset), groups.scale, groups.zero)

        def compiled() -> Encode:
            from bamba_quant.codecs.integers.compiled import quantizer

            run = quantizer(grid, name, offset)
            return lambda x, importance, shared: parts(*run(x, importance))

        return Method(name, about, encode, compiled, weighs=name != "rtn")

    return tuple(method(name, about) for name, about in (_SEARCHES | {"rtn": rtn}).items())


def as_bfloat16(scale: F32) -> Array:
    """Scales, or float zeros, as bfloat16. Raises ``FormatError`` for those that a bfloat16 cannot hold."""
    if not np.isfinite(scale).all():
        raise FormatError(
            "weights are too large for a bfloat16 scale",
            expected="a range below 3.4e38 in each group",
            fix="keep the tensor unquantized (--ignore)",
        )
    return scale.astype(ml_dtypes.bfloat16)
