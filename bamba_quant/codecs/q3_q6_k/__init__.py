"""Q3_K, Q6_K: 256 weights in groups of 16 with a signed scale each, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import (
    ONE,
    ZERO,
    as_bytes,
    largest,
    nearest_clipped,
    nearest_int,
    quiet,
    serial_sum,
    through_half,
)
from bamba_quant.codecs.arrays import F32, U8, Bytes
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, broadcast_rows, from_blocks, to_blocks
from bamba_quant.codecs.search import GROUP_MAX_EPS, make_q3_quants, make_qx_quants

BLOCK = 256
GROUP = 16
GROUPS = BLOCK // GROUP
_COMPILED = f"{__name__}.compiled"

Q3 = BlockLayout(
    block=BLOCK,
    block_bytes=110,
    group=GROUP,
    codes=Field((Bits(32, 2, BLOCK, run=32), Bits(0, 1, BLOCK, run=32, low=2)), zero=4),
    d=108,
    scales=Field((Bits(96, 4, GROUPS, run=8), Bits(104, 2, GROUPS, run=4, low=4)), zero=32),
)
Q6 = BlockLayout(
    block=BLOCK,
    block_bytes=210,
    group=GROUP,
    codes=Field((Bits(0, 4, BLOCK, run=64), Bits(128, 2, BLOCK, run=32, low=4)), zero=32),
    d=208,
    scales=Field((Bits(192, 8, GROUPS),), signed=True),
)


def _grouped(flat: F32) -> F32:
    """(256, n_blocks) to contiguous (16, groups, n_blocks)."""
    return np.ascontiguousarray(flat.reshape(GROUPS, GROUP, -1).swapaxes(0, 1))


def _requantize(x: F32, step: F32, nmax: int, L: F32) -> NDArray[np.int8]:
    """Integers against the scales as stored; a group whose step vanished keeps what the search left."""
    fitted = nearest_clipped(x / step, -nmax, nmax - 1) + np.float32(nmax)
    q = np.where(step != 0, fitted, L).swapaxes(0, 1).astype(np.uint8).reshape(BLOCK, -1)
    return _signed(q, nmax)


@quiet
def _quantize_q3_k(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:1229 without importance, :1355 with it."""
    flat = to_blocks(rows, BLOCK)
    x = _grouped(flat)
    if importance is None:
        scales, L = make_q3_quants(x, 4)
        greatest = largest(scales)
        iscale = np.float32(-32) / greatest
        # The integer passes through an int8 before it is clipped.
        codes = np.clip(nearest_int(iscale * scales).astype(np.int8), np.int8(-32), np.int8(31)) + np.int8(32)
        codes = np.where(greatest != 0, codes, 0).astype(np.uint8)
        d = np.where(greatest != 0, ONE / iscale, ZERO)
    else:
        sigma2 = np.float32(2) * serial_sum(flat * flat) / np.float32(BLOCK)
        weights = _grouped(to_blocks(broadcast_rows(importance, rows), BLOCK)) * np.sqrt(sigma2 + x * x)
        scales, L = make_qx_quants(x, 4, weights)
        d, fitted = make_qx_quants(scales, 32, serial_sum(weights))
        codes = fitted.astype(np.uint8)
    step = through_half(d) * (codes.astype(np.float32) - np.float32(32))
    q = _requantize(x, step, 4, L)
    return Q3.packed(rows.shape[1] // BLOCK, Fields(q, d, _signed(codes, 32)))


@quiet
def _quantize_q6_k(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:1869 and :1970; the importance itself is the weight here."""
    x = _grouped(to_blocks(rows, BLOCK))
    weights = None if importance is None else _grouped(to_blocks(broadcast_rows(importance, rows), BLOCK))
    scales, L = make_qx_quants(x, 32, weights)
    greatest = largest(scales)
    iscale = np.float32(-128) / greatest
    d = ONE / iscale
    codes = as_bytes(np.minimum(nearest_int(iscale * scales), 127))
    step = through_half(d) * codes.view(np.int8).astype(np.float32)
    out = Q6.join(Fields(_requantize(x, step, 32, L), d, codes.view(np.int8)))
    out[:, np.abs(greatest) < GROUP_MAX_EPS] = 0
    return from_blocks(rows.shape[1] // BLOCK, out)


def _signed(q: Bytes, zero: int) -> NDArray[np.int8]:
    return (q - np.uint8(zero)).view(np.int8)


CODECS = (
    block_codec("q3_k", Q3, _quantize_q3_k, compiled=_COMPILED, max_abs=32 * 65504.0),
    block_codec("q6_k", Q6, _quantize_q6_k, compiled=_COMPILED, max_abs=2048 * 65504.0),
)
