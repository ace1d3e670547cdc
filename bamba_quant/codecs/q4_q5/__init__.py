"""Q4_0, Q4_1, Q5_0, Q5_1: 32 weights under a float16 scale (and minimum), with the bytes that ggml writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import as_bytes, extremes, half_bytes, largest, quiet, reciprocal, truncate
from bamba_quant.codecs.arrays import F32, U8, Bytes
from bamba_quant.codecs.blocks import BlockCodec, block_codec
from bamba_quant.codecs.fields import BlockFields, BlockLayout, given
from bamba_quant.codecs.layout import from_blocks, halves, pack_nibbles, to_blocks, unpack_nibbles
from bamba_quant.codecs.search import Grid, make_qkx_quants, make_qx_quants

BLOCK = 32


def row_weights(x: F32, importance: F32) -> F32:
    """importance·√(σ² + x²), σ² the mean square of the whole row, summed serially (ggml-quants.c:2070)."""
    square = x * x
    sigma2 = np.add.accumulate(square, axis=1)[:, -1:] / np.float32(x.shape[1])
    weights: F32 = importance * np.sqrt(sigma2 + square)
    return weights


def _signed(bits: int) -> BlockCodec:
    nmax = 1 << (bits - 1)

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
        return from_blocks(x.shape[1] // BLOCK, _joined(L, bits, d))

    fields = BlockLayout(
        block=BLOCK,
        block_bytes=2 + 4 * bits,
        group=BLOCK,
        codes=(-nmax, nmax - 1),
        split=lambda blocks: BlockFields(
            (_integers(blocks[2:], bits) - np.uint8(nmax)).view(np.int8), halves(blocks[:2])
        ),
        join=lambda fields: _joined(fields.codes.view(np.uint8) + np.uint8(nmax), bits, fields.d),
    )
    return block_codec(
        f"q{bits}_0",
        GGMLQuantizationType[f"Q{bits}_0"],
        fields,
        quantize,
        compiled=f"{__name__}.compiled",
        max_abs=(nmax - 1) / 1.5 * 65504.0,
    )


def offset_grid(bits: int) -> Grid:
    """The grid searched with importance in Q4_1 and Q5_1."""
    return Grid((1 << bits) - 1, -0.9, 0.05, 36)


def _offset(bits: int) -> BlockCodec:
    nmax = (1 << bits) - 1

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
        return from_blocks(x.shape[1] // BLOCK, _joined(L, bits, d, m))

    fields = BlockLayout(
        block=BLOCK,
        block_bytes=4 + 4 * bits,
        group=BLOCK,
        codes=(0, nmax),
        split=lambda blocks: BlockFields(
            _integers(blocks[4:], bits), halves(blocks[:2]), dmin=-halves(blocks[2:4])
        ),
        join=lambda fields: _joined(fields.codes, bits, fields.d, -given(fields.dmin)),
    )
    return block_codec(
        f"q{bits}_1",
        GGMLQuantizationType[f"Q{bits}_1"],
        fields,
        quantize,
        compiled=f"{__name__}.compiled",
        max_abs=16376.0,
    )


def _joined(L: Bytes, bits: int, *halves: NDArray[Any]) -> Bytes:
    """A block's bytes: float16 numbers, then integers."""
    return np.concatenate((*map(half_bytes, halves), *_high_bits(L, bits), pack_nibbles(L & 15)))


def _high_bits(L: Bytes, bits: int) -> tuple[Bytes, ...]:
    """Bit 4 of integer j as bit j of 32, in four bytes; nothing where integers have four bits."""
    return () if bits == 4 else (np.packbits(L >> 4 & 1, axis=0, bitorder="little"),)


def _integers(packed: Bytes, bits: int) -> Bytes:
    if bits == 4:
        return unpack_nibbles(packed)
    L: Bytes = unpack_nibbles(packed[4:]) | np.unpackbits(packed[:4], axis=0, bitorder="little") << 4
    return L


CODECS = (_signed(4), _signed(5), _offset(4), _offset(5))
