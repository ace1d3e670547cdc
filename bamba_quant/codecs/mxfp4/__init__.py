"""MXFP4: 32 weights as four-bit floats (e2m1) under one power of two, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import as_bytes, quiet, truncate
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import BlockFields, BlockLayout
from bamba_quant.codecs.layout import from_blocks, pack_nibbles, to_blocks, unpack_nibbles

BLOCK = 32
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice e2m1


def half_powers(e: U8) -> F32:
    """2^(e - 128) in float32, the lowest two as subnormals (``ggml_e8m0_to_fp32_half``, ggml-impl.h:489)."""
    wide = e.astype(np.int32)
    return (
        np.where(wide < 2, 0x00200000 << np.minimum(wide, 1), wide - 1 << 23)
        .astype(np.int32)
        .view(np.float32)
    )


def _bytes_of(d: F32) -> U8:
    """The inverse of ``half_powers``."""
    bits = d.view(np.int32)
    return as_bytes(np.where(bits < 0x00800000, bits >> 22, (bits >> 23) + 1))


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
    return from_blocks(rows.shape[1] // BLOCK, e[None], pack_nibbles(index))


FIELDS = BlockLayout(
    block=BLOCK,
    block_bytes=17,
    group=BLOCK,
    codes=(0, 15),
    split=lambda blocks: BlockFields(unpack_nibbles(blocks[1:]), half_powers(blocks[0])),
    join=lambda fields: np.concatenate((_bytes_of(fields.d)[None], pack_nibbles(fields.codes))),
    table=VALUES,
)
CODECS = (
    block_codec("mxfp4", GGMLQuantizationType.MXFP4, FIELDS, _quantize, compiled=f"{__name__}.compiled"),
)
