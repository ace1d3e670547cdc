"""Q2_K, Q4_K, Q5_K: 256 weights in groups with a scale and a minimum each, byte for byte as ggml writes them.

The scales and minima are themselves small integers, under one float16 for the block's scales and one for
its minima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import (
    ZERO,
    as_bytes,
    half_bytes,
    nearest_clipped,
    nearest_int,
    quiet,
    serial_sum,
    through_half,
)
from bamba_quant.codecs.arrays import F32, U8, Bytes
from bamba_quant.codecs.blocks import BlockCodec, block_codec
from bamba_quant.codecs.fields import BlockFields, BlockLayout, given
from bamba_quant.codecs.layout import (
    broadcast_rows,
    from_blocks,
    halves,
    pack_bits,
    pack_nibbles,
    pack_scales_and_minima,
    pack_two_bit_codes,
    to_blocks,
    unpack_bits,
    unpack_nibbles,
    unpack_scales_and_minima,
    unpack_two_bit_codes,
)
from bamba_quant.codecs.search import Grid, make_qkx_quants, make_qp_quants

BLOCK = 256


@dataclass(frozen=True)
class KQuantLayout:
    """What tells the three formats apart.

    ``group`` weights share a scale; ``levels`` is the greatest code of a scale or a minimum, and ``capped``
    tells where ggml enforces that (without importance, with it). ``plain`` is the grid searched without
    importance, by absolute error when ``absolute``; ``sigma_factor`` multiplies the mean square in the
    weights with importance. ``d_at``, ``codes_at`` and ``integers_at`` are byte positions in the block;
    dmin follows d.
    """

    bits: int
    group: int
    levels: int
    capped: tuple[bool, bool]
    plain: Grid
    absolute: bool
    sigma_factor: float
    d_at: int
    codes_at: slice
    integers_at: slice
    pack_codes: Callable[[Bytes, Bytes], Bytes]
    unpack_codes: Callable[[Bytes], tuple[Bytes, Bytes]]
    pack: Callable[[Bytes], Bytes]
    unpack: Callable[[Bytes], Bytes]

    @property
    def nmax(self) -> int:
        return (1 << self.bits) - 1

    @property
    def weighted(self) -> Grid:
        """The grid searched with importance."""
        return Grid(self.nmax, -0.9, 0.05, 36)

    def grouped(self, flat: F32) -> F32:
        """(256, n_blocks) to contiguous (group, groups, n_blocks)."""
        return np.ascontiguousarray(flat.reshape(BLOCK // self.group, self.group, -1).swapaxes(0, 1))


# d, dmin (n_blocks,); codes of scales and of minima (groups, n_blocks); integers (group, groups, n_blocks).
Fit = tuple[F32, F32, U8, U8, F32]


def _fit_plain(kind: KQuantLayout, x: F32) -> Fit:
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


def _fit_weighted(kind: KQuantLayout, x: F32, sigma2: F32, importance: F32) -> Fit:
    """With importance (ggml-quants.c:1149, :1553, :1758): scales and minima are fitted in their turn."""
    weights = importance * np.sqrt(sigma2 + x * x)
    scales, minima, L = make_qkx_quants(x, weights, kind.weighted)
    group_weights = serial_sum(weights)
    d, scale_codes = make_qp_quants(scales, kind.levels, group_weights)
    dmin, minimum_codes = make_qp_quants(minima, kind.levels, group_weights)
    return d, dmin, as_bytes(scale_codes), as_bytes(minimum_codes), L


def _codec(name: str, block_bytes: int, max_abs: float, kind: KQuantLayout) -> BlockCodec:
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
        codes = kind.pack_codes(scales.astype(np.uint8), minima.astype(np.uint8))
        scales, minima = kind.unpack_codes(codes)
        step = through_half(d) * scales.astype(np.float32)
        low = through_half(dmin) * minima.astype(np.float32)
        # A group whose step vanished keeps what the search left.
        L = np.where(step != 0, nearest_clipped((x + low) / step, 0, kind.nmax), L)
        q = L.swapaxes(0, 1).astype(np.uint8).reshape(BLOCK, -1)
        return from_blocks(rows.shape[1] // BLOCK, join(BlockFields(q, d, scales, dmin, minima)))

    def split(blocks: Bytes) -> BlockFields:
        scales, minima = kind.unpack_codes(blocks[kind.codes_at])
        d, dmin = (halves(blocks[at : at + 2]) for at in (kind.d_at, kind.d_at + 2))
        return BlockFields(kind.unpack(blocks[kind.integers_at]), d, scales, dmin, minima)

    def join(fields: BlockFields) -> Bytes:
        out = np.empty((block_bytes, len(fields.d)), np.uint8)
        out[kind.d_at : kind.d_at + 2] = half_bytes(fields.d)
        out[kind.d_at + 2 : kind.d_at + 4] = half_bytes(given(fields.dmin))
        out[kind.codes_at] = kind.pack_codes(given(fields.scales), given(fields.minima))
        out[kind.integers_at] = kind.pack(fields.codes)
        return out

    levels = (0, kind.levels)
    fields = BlockLayout(BLOCK, block_bytes, kind.group, (0, kind.nmax), split, join, levels, levels)
    return block_codec(
        name,
        GGMLQuantizationType[name.upper()],
        fields,
        quantize,
        compiled=f"{__name__}.compiled",
        max_abs=max_abs,
    )


def _pack_five_bits(L: Bytes) -> Bytes:
    return np.concatenate((pack_bits(L >> 4), pack_nibbles(L & 15, group=64)))


def _unpack_five_bits(packed: Bytes) -> Bytes:
    L: Bytes = unpack_nibbles(packed[32:], group=64) | unpack_bits(packed[:32]) << 4
    return L


Q2 = KQuantLayout(
    bits=2,
    group=16,
    levels=15,
    capped=(False, False),
    plain=Grid(3, -0.5, 0.1, 15),
    absolute=True,
    sigma_factor=1,
    d_at=80,
    codes_at=slice(0, 16),
    integers_at=slice(16, 80),
    pack_codes=lambda scales, minima: scales | minima << 4,
    unpack_codes=lambda packed: (packed & 15, packed >> 4),
    pack=pack_two_bit_codes,
    unpack=unpack_two_bit_codes,
)
Q4 = KQuantLayout(
    bits=4,
    group=32,
    levels=63,
    capped=(True, False),
    plain=Grid(15, -1.0, 0.1, 20),
    absolute=False,
    sigma_factor=2,
    d_at=0,
    codes_at=slice(4, 16),
    integers_at=slice(16, 144),
    pack_codes=pack_scales_and_minima,
    unpack_codes=unpack_scales_and_minima,
    pack=lambda L: pack_nibbles(L, group=64),
    unpack=lambda packed: unpack_nibbles(packed, group=64),
)
Q5 = KQuantLayout(
    bits=5,
    group=32,
    levels=63,
    capped=(True, True),
    plain=Grid(31, -0.5, 0.1, 15),
    absolute=False,
    sigma_factor=2,
    d_at=0,
    codes_at=slice(4, 16),
    integers_at=slice(16, 176),
    pack_codes=pack_scales_and_minima,
    unpack_codes=unpack_scales_and_minima,
    pack=_pack_five_bits,
    unpack=_unpack_five_bits,
)

CODECS = (
    _codec("q2_k", 84, 9 * 16376.0, Q2),
    _codec("q4_k", 144, 41 * 16376.0, Q4),
    _codec("q5_k", 176, 41 * 16376.0, Q5),
)
