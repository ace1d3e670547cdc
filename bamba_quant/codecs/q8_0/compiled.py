"""Q8_0 on lanes: the compiled version of ``q8_0``, a block of 32 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import largest, reciprocal, round_half_away, store_half, to_half
from bamba_quant.codecs.compiled.lanes import LANES, load, magnitude, store_bytes
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.q8_0 import BLOCK, LAYOUT

SIZE, D, CODES = LAYOUT.block_bytes, LAYOUT.d, LAYOUT.codes.bits[0].at


def _q8_0(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, packed = scratch(BLOCK), byte_scratch(SIZE)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        d = magnitude(largest(tile, 0, BLOCK)) / 127
        inverse = reciprocal(d)
        store_half(packed, D, to_half(d))
        for i in range(BLOCK):
            store_bytes(packed, CODES + i, round_half_away(load(tile, i) * inverse))
        block_starts(first, n_blocks, n_blocks, SIZE, starts)
        write(packed, SIZE, out, starts)


KERNELS = {"q8_0": _q8_0}
