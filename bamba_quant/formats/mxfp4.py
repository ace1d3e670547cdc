"""MXFP4: 32 weights as four-bit floats (e2m1) under one power of two, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.formats.arithmetic import as_bytes, quiet, truncate
from bamba_quant.formats.base import F32, U8, Format, register
from bamba_quant.formats.layout import from_blocks, pack_nibbles, to_blocks, unpack_nibbles

BLOCK = 32
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice e2m1


def half_powers(e: U8) -> F32:
    """2^(e - 128) in float32, the lowest two as subnormals (``ggml_e8m0_to_fp32_half``, ggml-impl.h:493)."""
    wide = e.astype(np.int32)
    return (
        np.where(wide < 2, 0x00200000 << np.minimum(wide, 1), wide - 1 << 23)
        .astype(np.int32)
        .view(np.float32)
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
    """ggml-quants.c:351; importance changes nothing there either."""
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
    return from_blocks(rows.shape[1] // BLOCK, e[None], pack_nibbles(index))


def _dequantize(raw: U8) -> F32:
    blocks = to_blocks(raw, 17)
    return from_blocks(raw.shape[1] // 17, VALUES[unpack_nibbles(blocks[1:])] * half_powers(blocks[0]))


MXFP4 = register(Format("mxfp4", GGMLQuantizationType.MXFP4, BLOCK, 17, _quantize, _dequantize))
