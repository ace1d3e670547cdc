"""MXFP4: 32 weights as four-bit floats (e2m1) under one power of two, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arithmetic import as_bytes, quiet, truncate
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, half_powers, to_blocks

BLOCK = 32
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice e2m1
LAYOUT = BlockLayout(
    block=BLOCK,
    block_bytes=17,
    group=BLOCK,
    codes=Field((Bits(1, 4, BLOCK, run=16),)),
    d=0,
    exponent=True,
    table=VALUES,
)


def exponents(amax: F32) -> U8:
    """floor(log2(amax)) + 125, and 0 for amax 0.

    The logarithm is rounded to float32 before its floor is taken, as in C: just below a power of two it may
    reach that power. Below 2^-125 the byte wraps, as ggml's cast does.
    """
    logarithm = np.log2(amax.astype(np.float64)).astype(np.float32)
    e = np.floor(logarithm) - np.float32(2) + np.float32(127)
    return np.where(amax > 0, as_bytes(truncate(e)), np.uint8(0))


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:350; importance changes nothing there either."""
    x = to_blocks(rows, BLOCK)
    e = exponents(np.abs(x).max(axis=0))
    d = half_powers(e)
    index = np.zeros(x.shape, np.uint8)
    best = np.abs(VALUES[0] * d - x)
    for i, value in enumerate(VALUES[1:], start=1):
        error = np.abs(value * d - x)
        nearer = error < best
        index = np.where(nearer, np.uint8(i), index)
        best = np.where(nearer, error, best)
    return LAYOUT.packed(rows.shape[1] // BLOCK, Fields(index, d))


CODECS = (block_codec("mxfp4", LAYOUT, _quantize, compiled=f"{__name__}.compiled"),)
