"""Q8_0: 32 weights as signed bytes under one float16 scale, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.formats.arithmetic import as_bytes, half_bytes, quiet, reciprocal, round_half_away, truncate
from bamba_quant.formats.base import F32, U8, Format, register
from bamba_quant.formats.layout import from_blocks, halves, to_blocks

BLOCK = 32


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:286; importance changes nothing there either. Integers use the scale before rounding."""
    x = to_blocks(rows, BLOCK)  # (32, n_blocks)
    d = np.abs(x).max(axis=0) / np.float32(127)
    return from_blocks(
        rows.shape[1] // BLOCK, half_bytes(d), as_bytes(truncate(round_half_away(x * reciprocal(d))))
    )


def _dequantize(raw: U8) -> F32:
    blocks = to_blocks(raw, 34)
    return from_blocks(raw.shape[1] // 34, blocks[2:].view(np.int8).astype(np.float32) * halves(blocks[:2]))


Q8_0 = register(
    Format("q8_0", GGMLQuantizationType.Q8_0, BLOCK, 34, _quantize, _dequantize, max_abs=127 * 65504.0)
)
