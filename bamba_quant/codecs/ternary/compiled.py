"""TQ1_0 and TQ2_0 on lanes: the compiled version of ``ternary``, a block of 256 a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import largest, reciprocal, round_half_away, store_half, to_half
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    ints,
    load,
    magnitude,
    store,
    store_bytes,
    to_floats,
    to_ints,
)
from bamba_quant.codecs.compiled.packing import packers
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.ternary import BLOCK, RUNS, TQ2_0

(_RUN_1, _RUN_2, _RUN_3) = RUNS
(_PACK_TQ2,) = packers(TQ2_0.codes)


def _tq1_0(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, packed = scratch(BLOCK), byte_scratch(54)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        store_half(packed, 52, to_half(_trits(tile)))
        _pack_trits(tile, 0, _RUN_1, packed, 0)
        _pack_trits(tile, 160, _RUN_2, packed, 32)
        _pack_trits(tile, 240, _RUN_3, packed, 48)
        block_starts(first, n_blocks, n_blocks, 54, starts)
        write(packed, 54, out, starts)


def _tq2_0(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, packed = scratch(BLOCK), byte_scratch(66)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        store_half(packed, 64, to_half(_trits(tile)))
        _PACK_TQ2(tile, packed)
        block_starts(first, n_blocks, n_blocks, 66, starts)
        write(packed, 66, out, starts)


@inlined
def _trits(tile: Any) -> Any:
    """The scale of each lane; 0, 1 or 2 replaces each value."""
    d = magnitude(largest(tile, 0, BLOCK))
    inverse = reciprocal(d)
    for i in range(BLOCK):
        store(tile, i, to_floats((round_half_away(load(tile, i) * inverse) + 1) & 3))
    return d


@inlined
def _pack_trits(tile: Any, first: int, run: Any, packed: Any, at: int) -> None:
    size, count = run
    for i in range(size):
        number = ints(0)
        for k in range(5):
            number = number * 3
            if k < count:
                number = number + to_ints(load(tile, first + k * size + i))
        # number·256/243 rounded up; a quotient of such small integers is never rounded across an integer.
        store_bytes(packed, at + i, to_ints(to_floats(number * 256 + 242) / 243))


KERNELS = {"tq1_0": _tq1_0, "tq2_0": _tq2_0}
