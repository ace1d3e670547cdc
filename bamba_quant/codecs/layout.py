"""How integers lie in the bytes of ggml's blocks; blocks run along the trailing axis, all packed at once."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, Bytes

Scalar = TypeVar("Scalar", bound=np.generic)


def to_blocks(rows: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """(rows, n) to contiguous (size, n_blocks)."""
    return np.ascontiguousarray(rows.reshape(-1, size).T)


def broadcast_rows(importance: F32, rows: F32) -> F32:
    """Importance (n,) as it applies to each of the rows, (rows, n)."""
    return np.broadcast_to(importance, rows.shape)


def from_blocks(per_row: int, *parts: NDArray[Any]) -> NDArray[Any]:
    """Parts of shape (size, n_blocks), laid one after the other, to rows of ``per_row`` blocks."""
    together = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(together.T).reshape(-1, per_row * len(together))


def halves(pair: Bytes) -> NDArray[np.float16]:
    """Two bytes of a float16, (2, n_blocks), to (n_blocks,)."""
    return np.ascontiguousarray(pair.T).view("<f2")[:, 0]


def pack_nibbles(L: Bytes, group: int = 32) -> Bytes:
    """In each group, the first half takes the low four bits and the second the high: (n, …) to (n/2, …)."""
    pairs = L.reshape(len(L) // group, 2, group // 2, *L.shape[1:])
    packed: Bytes = pairs[:, 0] | pairs[:, 1] << 4
    return packed.reshape(len(L) // 2, *L.shape[1:])


def unpack_nibbles(packed: Bytes, group: int = 32) -> Bytes:
    """The inverse of ``pack_nibbles``."""
    pairs = packed.reshape(2 * len(packed) // group, group // 2, *packed.shape[1:])
    return np.stack((pairs & 15, pairs >> 4), axis=1).reshape(2 * len(packed), *packed.shape[1:])


def pack_two_bit_codes(L: Bytes) -> Bytes:
    """Two bits each; in every 128, byte j holds integers j, j+32, j+64, j+96: (256, …) to (64, …)."""
    q = L.reshape(2, 4, 32, *L.shape[1:])
    packed: Bytes = q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6
    return packed.reshape(64, *L.shape[1:])


def unpack_two_bit_codes(packed: Bytes) -> Bytes:
    """The inverse of ``pack_two_bit_codes``."""
    q = packed.reshape(2, 32, *packed.shape[1:])
    return np.stack([q >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(256, *packed.shape[1:])


def pack_bits(L: Bytes) -> Bytes:
    """One bit each; bit k of byte j belongs to integer 32·k + j: (256, …) of 0 and 1 to (32, …)."""
    packed: Bytes = np.bitwise_or.reduce([L.reshape(8, 32, *L.shape[1:])[k] << k for k in range(8)])
    return packed


def unpack_bits(packed: Bytes) -> Bytes:
    """The inverse of ``pack_bits``."""
    return np.concatenate([packed >> k & 1 for k in range(8)])


def pack_scales_and_minima(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and minima of six bits, (8, …) each, to 12 bytes of Q4_K or Q5_K (ggml-quants.c:1498).

    A byte above 63, which a search may hand on, spills into its neighbour's high bits exactly as in ggml.
    """
    return np.concatenate(
        (
            scales[:4] | scales[4:] >> 4 << 6,
            minima[:4] | minima[4:] >> 4 << 6,
            scales[4:] & 15 | (minima[4:] & 15) << 4,
        )
    )


def unpack_scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes to eight scales and eight minima (``get_scale_min_k4``)."""
    low_scales, low_minima, rest = packed[:4], packed[4:8], packed[8:]
    scales = np.concatenate((low_scales & 63, rest & 15 | low_scales >> 6 << 4))
    minima = np.concatenate((low_minima & 63, rest >> 4 | low_minima >> 6 << 4))
    return scales, minima


def pack_signed_scales(scales: Bytes) -> Bytes:
    """Sixteen 6-bit scales, (16, …), to the 12 bytes of Q3_K: low nibbles in 8, then high pairs in 4."""
    high = (scales >> 4).reshape(4, 4, *scales.shape[1:])
    low = scales & 15
    return np.concatenate((low[:8] | low[8:] << 4, high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6))


def unpack_signed_scales(packed: Bytes) -> Bytes:
    """The inverse of ``pack_signed_scales``."""
    low = np.concatenate((packed[:8] & 15, packed[:8] >> 4))
    scales: Bytes = low | np.concatenate([packed[8:] >> shift & 3 for shift in (0, 2, 4, 6)]) << 4
    return scales
