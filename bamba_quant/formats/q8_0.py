"""Q8_0: 32 weights as signed bytes under one float16 scale, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as GGML

from bamba_quant.formats.base import F32, U8, Format, register

BLOCK = 32
_BLOCK_DTYPE = np.dtype([("d", "<f2"), ("q", "i1", (BLOCK,))])


def _quantize(x: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c, ``quantize_row_q8_0_ref``; importance changes nothing there either."""
    blocks = x.reshape(-1, BLOCK)  # (n_blocks, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)  # (n_blocks, 1)
    d = amax / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    # C's roundf: halves away from zero. x - floor(x) is exact in float32.
    scaled = blocks * inverse
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    magnitude = floor + (magnitude - floor >= np.float32(0.5))
    out = np.empty(len(blocks), dtype=_BLOCK_DTYPE)
    with np.errstate(over="ignore"):
        out["d"] = d[:, 0]
    out["q"] = np.copysign(magnitude, scaled)
    return out.view(np.uint8).reshape(len(x), -1)


def _dequantize(raw: U8) -> F32:
    blocks = raw.reshape(-1).view(_BLOCK_DTYPE)
    x = blocks["q"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None]
    return x.reshape(len(raw), -1)


Q8_0 = register(Format("q8_0", GGML.Q8_0, BLOCK, 34, _quantize, _dequantize, max_abs=127 * 65504.0))
