"""How integers become bytes: the packing half of ``bamba_quant.codecs.layout`` on lanes.

Integers stand in the rows of a tile as floats; ``at`` is the first row of bytes that is written.
"""

from __future__ import annotations

from typing import Any

from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import load, store_bytes, to_ints


@inlined
def pack_nibbles(tile: Any, n: int, group: int, packed: Any, at: int) -> None:
    """In each group the first half takes the low four bits and the second the high."""
    half = group // 2
    for first in range(0, n, group):
        for i in range(half):
            low, high = to_ints(load(tile, first + i)), to_ints(load(tile, first + half + i))
            store_bytes(packed, at + first // 2 + i, (low & 15) | ((high & 15) << 4))


@inlined
def pack_two_bit_codes(tile: Any, shift: int, packed: Any, at: int) -> None:
    """Bits ``shift`` and ``shift`` + 1; in every 128, byte j holds integers j, j+32, j+64, j+96."""
    for first in (0, 128):
        for i in range(32):
            byte = (to_ints(load(tile, first + i)) >> shift) & 3
            for k in range(1, 4):
                byte = byte | (((to_ints(load(tile, first + 32 * k + i)) >> shift) & 3) << (2 * k))
            store_bytes(packed, at + first // 4 + i, byte)


@inlined
def pack_bits(tile: Any, shift: int, packed: Any, at: int) -> None:
    """Bit ``shift``; bit k of byte j belongs to integer 32·k + j."""
    for i in range(32):
        byte = (to_ints(load(tile, i)) >> shift) & 1
        for k in range(1, 8):
            byte = byte | (((to_ints(load(tile, 32 * k + i)) >> shift) & 1) << k)
        store_bytes(packed, at + i, byte)
