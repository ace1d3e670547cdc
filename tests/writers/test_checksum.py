"""The checksum of pieces is zlib's of the whole."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from bamba_quant.writers.checksum import Checksum


@pytest.mark.parametrize("length", [0, 1, 1000, 200_001])
def test_pieces_in_any_order(length: int) -> None:
    random = np.random.default_rng(length)
    whole = random.integers(0, 256, length, np.uint8)
    cuts = [0, *sorted(random.integers(0, length + 1, 9).tolist()), length]
    checksum = Checksum(length)
    for number in random.permutation(len(cuts) - 1):
        start, stop = cuts[number], cuts[number + 1]
        checksum.add(start, whole[start:stop] if number % 2 else whole[start:stop].tobytes())
    assert checksum.value == zlib.adler32(whole.tobytes(), 0)


def test_bytes_that_are_not_added_are_zeros() -> None:
    checksum = Checksum(100)
    checksum.add(40, b"abc")
    assert checksum.value == zlib.adler32(bytes(40) + b"abc" + bytes(57), 0)
