"""Dequantizes packed rows on every core, with temporaries whose size does not depend on the number of rows."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec

# Weights of a chunk: its temporaries stay in a core's cache.
_PIECE = 1 << 18


def decode(codec: BlockCodec, raw: U8, out: F32 | None = None) -> F32:
    """float32 (rows, n) of uint8 (rows, ``row_bytes(n)``), into ``out`` if given: ``BlockCodec.dequantize``'s values.

    Many rows are read by compiled kernels where the codec has them, else some at a time.
    """
    rows, row_bytes = raw.shape
    columns = row_bytes // codec.block_bytes * codec.block_size
    step = max(1, _PIECE // columns)
    if rows <= step and out is None:
        return codec.dequantize(raw)
    out = np.empty((rows, columns), np.float32) if out is None else out

    def piece(start: int) -> None:
        out[start : start + step] = codec.dequantize(raw[start : start + step])

    if rows <= step:
        piece(0)
        return out
    from bamba_quant.codecs.compiled.rows import row_kernels

    kernels = row_kernels(codec, columns)
    if kernels is not None:
        kernels.decode(np.ascontiguousarray(raw), out)
        return out
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(piece, range(0, rows, step)):
            pass
    return out
