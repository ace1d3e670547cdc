"""Q4_0, Q4_1, Q5_0, Q5_1: 32 weights under a float16 scale (and minimum), with the bytes that ggml writes."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arithmetic import as_bytes, extremes, largest, quiet, reciprocal, truncate
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec, block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, to_blocks
from bamba_quant.codecs.search import ScaleTrials, make_qkx_quants, make_qx_quants

BLOCK = 32


def row_weights(x: F32, importance: F32) -> F32:
    """importance·√(σ² + x²), σ² the mean square of the whole row, summed serially (ggml-quants.c:2070)."""
    square = x * x
    sigma2 = np.add.accumulate(square, axis=1)[:, -1:] / np.float32(x.shape[1])
    weights: F32 = importance * np.sqrt(sigma2 + square)
    return weights


def layout_of(bits: int, offset: bool) -> BlockLayout:
    """Q4_0's or Q5_0's blocks, with ``offset`` Q4_1's or Q5_1's; the fifth bits come before the nibbles."""
    size = (4 if offset else 2) + 4 * bits
    nibbles, fifth = Bits(size - 16, 4, BLOCK, run=16), Bits(size - 20, 1, BLOCK, low=4)
    return BlockLayout(
        block=BLOCK,
        block_bytes=size,
        group=BLOCK,
        codes=Field((nibbles,) if bits == 4 else (nibbles, fifth), zero=0 if offset else 1 << (bits - 1)),
        d=0,
        dmin=2 if offset else None,
        added=offset,
    )


def _signed(bits: int) -> BlockCodec:
    nmax, layout = 1 << (bits - 1), layout_of(bits, offset=False)

    @quiet
    def quantize(x: F32, importance: F32 | None = None) -> U8:
        """ggml-quants.c:113 and :187 without importance, :2070 and :2188 with it."""
        v = to_blocks(x, BLOCK)  # (32, n_blocks)
        if importance is None:
            d = largest(v) / np.float32(-nmax)
            q = truncate(v * reciprocal(d) + np.float32(nmax + 0.5)).astype(np.int8)
            L = as_bytes(np.minimum(q, np.int8(2 * nmax - 1)))
        else:
            d, fitted = make_qx_quants(v, nmax, to_blocks(row_weights(x, importance), BLOCK))
            L = fitted.astype(np.uint8)
        return layout.packed(x.shape[1] // BLOCK, Fields((L - np.uint8(nmax)).view(np.int8), d))

    return block_codec(
        f"q{bits}_0",
        layout,
        quantize,
        compiled=f"{__name__}.compiled",
        max_abs=(nmax - 1) / 1.5 * 65504.0,
    )


def offset_grid(bits: int) -> ScaleTrials:
    """The grid searched with importance in Q4_1 and Q5_1."""
    return ScaleTrials((1 << bits) - 1, -0.9, 0.05, 36)


def _offset(bits: int) -> BlockCodec:
    nmax, layout = (1 << bits) - 1, layout_of(bits, offset=True)

    @quiet
    def quantize(x: F32, importance: F32 | None = None) -> U8:
        """ggml-quants.c:150 and :231 without importance, :2143 and :2242 with it."""
        v = to_blocks(x, BLOCK)  # (32, n_blocks)
        if importance is None:
            m, high = extremes(v)
            d = (high - m) / np.float32(nmax)
            q = truncate((v - m) * reciprocal(d) + np.float32(0.5)).astype(np.int8)
            L = as_bytes(np.minimum(q, np.int8(nmax)))
        else:
            weights = to_blocks(row_weights(x, importance), BLOCK)
            d, low, fitted = make_qkx_quants(v, weights, offset_grid(bits))
            L, m = fitted.astype(np.uint8), -low
        return layout.packed(x.shape[1] // BLOCK, Fields(L, d, dmin=-m))

    return block_codec(
        f"q{bits}_1",
        layout,
        quantize,
        compiled=f"{__name__}.compiled",
        max_abs=16376.0,
    )


CODECS = (_signed(4), _signed(5), _offset(4), _offset(5))
