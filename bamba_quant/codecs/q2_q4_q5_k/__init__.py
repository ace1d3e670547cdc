"""Q2_K, Q4_K, Q5_K: 256 weights in groups with a scale and a minimum each, byte for byte as ggml writes them.

The scales and minima are themselves small integers, under one float16 for the block's scales and one for
its minima.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bamba_quant.codecs.arithmetic import (
    ZERO,
    as_bytes,
    nearest_clipped,
    nearest_int,
    quiet,
    serial_sum,
    through_half,
)
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec, block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, broadcast_rows, to_blocks
from bamba_quant.codecs.search import ScaleTrials, make_qkx_quants, make_qp_quants

BLOCK = 256


def _six_bits(at: int, high_shift: int) -> Field:
    """Eight scales or minima of Q4_K and Q5_K (``get_scale_min_k4``): four whole, of four the high bits, in four bytes.

    A number above 63, which a search can return, spills into the high bits of another (ggml-quants.c:1498).
    """
    return Field((
        Bits(at, 6, 4, per_byte=1, spills=True),
        Bits(12, 4, 4, first=4, shift=high_shift, per_byte=1),
        Bits(at, 2, 4, first=4, low=4, shift=6, per_byte=1),
    ))  # fmt: skip


def _six_bit_layout(block_bytes: int, *codes: Bits) -> BlockLayout:
    scales, minima = _six_bits(4, 0), _six_bits(8, 4)
    return BlockLayout(BLOCK, block_bytes, 32, Field(codes), d=0, scales=scales, dmin=2, minima=minima)


@dataclass(frozen=True)
class KQuant:
    """A layout, and how its search differs from the other two.

    ``capped`` tells where ggml limits scales and minima to what their bits hold (without importance, with it).
    ``plain`` is the grid searched without importance, by absolute error when ``absolute``; ``sigma_factor`` multiplies
    the mean square in the weights with importance.
    """

    layout: BlockLayout
    capped: tuple[bool, bool]
    plain: ScaleTrials
    absolute: bool
    sigma_factor: float

    @property
    def group(self) -> int:
        return self.layout.group

    @property
    def nmax(self) -> int:
        return self.layout.codes.range[1]

    @property
    def levels(self) -> int:
        """The greatest scale or minimum."""
        assert self.layout.scales is not None
        return self.layout.scales.range[1]

    @property
    def weighted(self) -> ScaleTrials:
        """The grid searched with importance."""
        return ScaleTrials(self.nmax, -0.9, 0.05, 36)

    def grouped(self, flat: F32) -> F32:
        """(256, n_blocks) to contiguous (group, groups, n_blocks)."""
        return np.ascontiguousarray(flat.reshape(BLOCK // self.group, self.group, -1).swapaxes(0, 1))


Q2 = KQuant(
    BlockLayout(
        BLOCK,
        84,
        16,
        Field((Bits(16, 2, BLOCK, run=32),)),
        d=80,
        dmin=82,
        scales=Field((Bits(0, 4, 16, per_byte=1, spills=True),)),
        minima=Field((Bits(0, 4, 16, shift=4, per_byte=1),)),
    ),
    capped=(False, False),
    plain=ScaleTrials(3, -0.5, 0.1, 15),
    absolute=True,
    sigma_factor=1,
)
Q4 = KQuant(
    _six_bit_layout(144, Bits(16, 4, BLOCK, run=32)),
    capped=(True, False),
    plain=ScaleTrials(15, -1.0, 0.1, 20),
    absolute=False,
    sigma_factor=2,
)
Q5 = KQuant(
    _six_bit_layout(176, Bits(48, 4, BLOCK, run=32), Bits(16, 1, BLOCK, run=32, low=4)),
    capped=(True, True),
    plain=ScaleTrials(31, -0.5, 0.1, 15),
    absolute=False,
    sigma_factor=2,
)

# d, dmin (n_blocks,); scales and minima (groups, n_blocks); codes (group, groups, n_blocks).
Fit = tuple[F32, F32, U8, U8, F32]


def _fit_plain(kind: KQuant, x: F32) -> Fit:
    """Without importance (ggml-quants.c:891, :1457, :1644): scales and minima are coded by plain rounding."""
    weights = np.abs(x)
    if not kind.absolute:
        weights = np.sqrt(serial_sum(x * x) / np.float32(kind.group)) + weights
    scales, minima, L = make_qkx_quants(x, weights, kind.plain, kind.absolute)
    d, scale_codes = _code(scales, kind.levels)
    dmin, minimum_codes = _code(minima, kind.levels)
    return d, dmin, scale_codes, minimum_codes, L


def _code(values: F32, levels: int) -> tuple[F32, U8]:
    """Numbers (groups, n_blocks) as multiples of their greatest/levels; all 0 where none is positive."""
    greatest = np.zeros(values.shape[1:], np.float32)
    for value in values:
        greatest = np.where(value > greatest, value, greatest)
    positive = greatest > 0
    codes = nearest_int(np.where(positive, np.float32(levels) / greatest, ZERO) * values)
    return greatest / np.float32(levels), as_bytes(np.where(positive, codes, 0))


def _fit_weighted(kind: KQuant, x: F32, sigma2: F32, importance: F32) -> Fit:
    """With importance (ggml-quants.c:1149, :1553, :1758): scales and minima are fitted too."""
    weights = importance * np.sqrt(sigma2 + x * x)
    scales, minima, L = make_qkx_quants(x, weights, kind.weighted)
    group_weights = serial_sum(weights)
    d, scale_codes = make_qp_quants(scales, kind.levels, group_weights)
    dmin, minimum_codes = make_qp_quants(minima, kind.levels, group_weights)
    return d, dmin, as_bytes(scale_codes), as_bytes(minimum_codes), L


def _codec(name: str, max_abs: float, kind: KQuant) -> BlockCodec:
    layout = kind.layout

    @quiet
    def quantize(rows: F32, importance: F32 | None = None) -> U8:
        flat = to_blocks(rows, BLOCK)
        x = kind.grouped(flat)
        if importance is None:
            d, dmin, scales, minima, L = _fit_plain(kind, x)
        else:
            sigma2 = np.float32(kind.sigma_factor) * serial_sum(flat * flat) / np.float32(BLOCK)
            weights = kind.grouped(to_blocks(broadcast_rows(importance, rows), BLOCK))
            d, dmin, scales, minima, L = _fit_weighted(kind, x, sigma2, weights)
        if kind.capped[importance is not None]:
            scales, minima = np.minimum(scales, kind.levels), np.minimum(minima, kind.levels)
        empty = np.zeros((BLOCK, x.shape[-1]), np.uint8)
        # Codes follow the scales and minima that a reader finds in the bytes.
        stored = layout.split(layout.join(Fields(empty, d, scales, dmin, minima)))
        assert stored.scales is not None and stored.minima is not None
        step = through_half(d) * stored.scales.astype(np.float32)
        low = through_half(dmin) * stored.minima.astype(np.float32)
        # A group whose step vanished keeps the codes of the search.
        L = np.where(step != 0, nearest_clipped((x + low) / step, 0, kind.nmax), L)
        q = L.swapaxes(0, 1).astype(np.uint8).reshape(BLOCK, -1)
        fields = Fields(q, d, stored.scales, dmin, stored.minima)
        return layout.packed(rows.shape[1] // BLOCK, fields)

    return block_codec(name, layout, quantize, compiled=f"{__name__}.compiled", max_abs=max_abs)


CODECS = (
    _codec("q2_k", 9 * 16376.0, Q2),
    _codec("q4_k", 41 * 16376.0, Q4),
    _codec("q5_k", 41 * 16376.0, Q5),
)
