"""The Adler-32 checksum of bytes that are written in any order, from any thread."""

from __future__ import annotations

import threading
import zlib

import numpy as np

from bamba_quant.codecs.arrays import U8

_MODULUS = 65521


class Checksum:
    """Of ``n_bytes`` bytes, zero where nothing is added: ``zlib.adler32(whole, 0)``.

    Its halves are the sum of all bytes, and the sum of each byte times the number of bytes from it to the end, so
    the checksums of slices add up.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._sum = self._weighted = 0
        self._lock = threading.Lock()

    def add(self, offset: int, data: U8 | bytes) -> None:
        """Count ``data``, which lies at ``offset``; no byte may be counted twice."""
        found = zlib.adler32(data.data if isinstance(data, np.ndarray) else data, 0)
        data_sum, data_weighted = found & 0xFFFF, found >> 16
        after = self._n_bytes - offset - len(data)
        with self._lock:
            self._sum = (self._sum + data_sum) % _MODULUS
            self._weighted = (self._weighted + data_weighted + after * data_sum) % _MODULUS

    @property
    def value(self) -> int:
        return self._weighted << 16 | self._sum
