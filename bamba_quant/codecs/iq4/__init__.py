"""IQ4_NL, IQ4_XS: four bits index sixteen unevenly spaced values, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arithmetic import (
    ONE,
    ZERO,
    largest,
    nearest_clipped,
    quiet,
    reciprocal,
    serial_sum,
)
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, broadcast_rows, to_blocks
from bamba_quant.codecs.search import GROUP_MAX_EPS

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# ggml compares x - VALUES[i] < VALUES[i+1] - x in float32 (ggml-quants.c:28). That is x < midpoint exactly:
# near a midpoint both differences are exact, and away from it rounding cannot turn their order.
MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
GROUP = 32
TRIES = 7
_COMPILED = f"{__name__}.compiled"

SUPERBLOCK = 256
GROUPS = SUPERBLOCK // GROUP

NL = BlockLayout(
    block=GROUP, block_bytes=18, group=GROUP, codes=Field((Bits(2, 4, GROUP, run=16),)), d=0, table=VALUES
)
XS = BlockLayout(
    block=SUPERBLOCK,
    block_bytes=136,
    group=GROUP,
    codes=Field((Bits(8, 4, SUPERBLOCK, run=16),)),
    d=0,
    scales=Field((Bits(4, 4, GROUPS), Bits(2, 2, GROUPS, low=4)), zero=32),
    table=VALUES,
)


def nearest_value(v: F32) -> U8:
    """Index of the nearest table value, the upper one on a tie, the last one for NaN."""
    index = np.zeros(v.shape, np.uint8)
    for midpoint in MIDPOINTS:
        index += ~(v < midpoint)
    return index


def fit_scales(x: F32, sigma2: F32, importance: F32 | None) -> F32:
    """The scale of each group of ``x`` (32, …), σ² given as that of its block (ggml-quants.c:4937)."""
    w = x * x
    if importance is not None:
        w = importance * np.sqrt(sigma2 + w)
    greatest = largest(x)

    def fit(inverse: F32) -> tuple[F32, F32]:
        q = VALUES[nearest_value(inverse * x)]
        return serial_sum(w * q * x), serial_sum(w * q * q)

    sumqx, sumq2 = fit(ONE / (-greatest / VALUES[0]))
    d = np.where(sumq2 > 0, sumqx / sumq2, ZERO)
    best = d * sumqx
    for i in range(-TRIES, TRIES + 1):
        sumqx, sumq2 = fit((np.float32(i) + VALUES[0]) / greatest)
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        d = np.where(better, sumqx / sumq2, d)
        best = np.where(better, d * sumqx, best)
    return np.where(np.abs(greatest) < GROUP_MAX_EPS, ZERO, d)


@quiet
def _quantize_nl(rows: F32, importance: F32 | None = None) -> U8:
    x = to_blocks(rows, GROUP)
    weights = None if importance is None else to_blocks(broadcast_rows(importance, rows), GROUP)
    sigma2 = serial_sum(x * x) * np.float32(2 / GROUP)
    d = fit_scales(x, sigma2, weights)
    return NL.packed(rows.shape[1] // GROUP, Fields(nearest_value(reciprocal(d) * x), d))


@quiet
def _quantize_xs(rows: F32, importance: F32 | None = None) -> U8:
    flat = to_blocks(rows, SUPERBLOCK)
    x = _grouped(flat)
    weights = (
        None if importance is None else _grouped(to_blocks(broadcast_rows(importance, rows), SUPERBLOCK))
    )
    sigma2 = serial_sum(flat * flat) * np.float32(2 / SUPERBLOCK)
    scales = fit_scales(x, sigma2, weights)
    d = -largest(scales) / np.float32(32)
    fitted = nearest_clipped(reciprocal(d) * scales, -32, 31)
    # The integers are fitted to the scale before float16 rounds it (ggml-quants.c:5022).
    L = nearest_value(reciprocal(d * fitted) * x).swapaxes(0, 1).reshape(SUPERBLOCK, -1)
    return XS.packed(rows.shape[1] // SUPERBLOCK, Fields(L, d, fitted.astype(np.int8)))


def _grouped(flat: F32) -> F32:
    """(256, n_blocks) to contiguous (32, 8, n_blocks)."""
    return np.ascontiguousarray(flat.reshape(GROUPS, GROUP, -1).swapaxes(0, 1))


CODECS = (
    block_codec("iq4_nl", NL, _quantize_nl, compiled=_COMPILED, max_abs=16 * 65504.0),
    block_codec("iq4_xs", XS, _quantize_xs, compiled=_COMPILED, max_abs=512 * 65504.0),
)
