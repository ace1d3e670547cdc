"""MXFP4 on lanes: the compiled version of ``mxfp4``, a block of 32 a lane."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import largest
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    LANES,
    floats,
    from_bits,
    load,
    magnitude,
    store,
    store_bytes,
    to_ints,
    where,
)
from bamba_quant.codecs.compiled.packing import packers
from bamba_quant.codecs.compiled.tiles import block_starts, byte_scratch, read, scratch, write
from bamba_quant.codecs.mxfp4 import BLOCK, LAYOUT, VALUES

SIZE, D = LAYOUT.block_bytes, LAYOUT.d
(PACK,) = packers(LAYOUT.codes)


def _mxfp4(x: Any, importance: Any, out: Any) -> None:
    n_blocks = x.size // BLOCK
    starts = np.empty(LANES, np.intp)
    tile, exponents, packed = scratch(BLOCK), scratch(1), byte_scratch(SIZE)
    for first in range(0, n_blocks, LANES):
        block_starts(first, n_blocks, n_blocks, BLOCK, starts)
        read(x, starts, BLOCK, tile)
        store(exponents, 0, magnitude(largest(tile, 0, BLOCK)))
        for lane in range(LANES):
            exponents[0, lane] = _exponent(exponents[0, lane])
        e = to_ints(load(exponents, 0))
        store_bytes(packed, D, e)
        d = from_bits(where(e < 2, (e + 1) * 0x00200000, (e - 1) << 23))
        for i in range(BLOCK):
            value = load(tile, i)
            index, best = floats(0), magnitude(VALUES[0] * d - value)
            for k in range(1, VALUES.size):
                error = magnitude(VALUES[k] * d - value)
                nearer = error < best
                index = where(nearer, floats(k), index)
                best = where(nearer, error, best)
            store(tile, i, index)
        PACK(tile, packed)
        block_starts(first, n_blocks, n_blocks, SIZE, starts)
        write(packed, SIZE, out, starts)


@inlined
def _exponent(amax: Any) -> Any:
    """The byte of ``bamba_quant.codecs.mxfp4.exponents``, of one magnitude."""
    if amax == 0:
        return np.float32(0)
    logarithm = np.float32(math.log2(np.float64(amax)))
    return np.float32((math.floor(logarithm) + 125) & 255)


KERNELS = {"mxfp4": _mxfp4}
