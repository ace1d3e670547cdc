"""The Adler-32 checksum of bytes that are written by pieces in any order, from any thread."""

from __future__ import annotations

import threading
import zlib

import numpy as np

from bamba_quant.codecs.arrays import U8

_MODULUS = 65521


class Checksum:
    """Of ``n_bytes`` bytes, zero where nothing is added: ``zlib.adler32(whole, 0)``.

    Its halves are the sum of all bytes, and the sum of each byte times the number of bytes from it to the end, so
    pieces add up.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._sum = self._weighted = 0
        self._adding = threading.Lock()

    def add(self, offset: int, piece: U8 | bytes) -> None:
        """Count ``piece``, which lies at ``offset``; no byte may be counted twice."""
        found = zlib.adler32(piece.data if isinstance(piece, np.ndarray) else piece, 0)
        piece_sum, piece_weighted = found & 0xFFFF, found >> 16
        behind = self._n_bytes - offset - len(piece)
        with self._adding:
            self._sum = (self._sum + piece_sum) % _MODULUS
            self._weighted = (self._weighted + piece_weighted + behind * piece_sum) % _MODULUS

    @property
    def value(self) -> int:
        return self._weighted << 16 | self._sum
