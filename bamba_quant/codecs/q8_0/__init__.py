"""Q8_0: 32 weights as signed bytes under one float16 scale, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arithmetic import as_bytes, quiet, reciprocal, round_half_away, truncate
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, to_blocks

BLOCK = 32
LAYOUT = BlockLayout(
    block=BLOCK, block_bytes=34, group=BLOCK, codes=Field((Bits(2, 8, BLOCK),), signed=True), d=0
)


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:276; importance changes nothing there either. Integers use the scale before rounding."""
    x = to_blocks(rows, BLOCK)  # (32, n_blocks)
    d = np.abs(x).max(axis=0) / np.float32(127)
    codes = as_bytes(truncate(round_half_away(x * reciprocal(d)))).view(np.int8)
    return LAYOUT.packed(rows.shape[1] // BLOCK, Fields(codes, d))


CODECS = (block_codec("q8_0", LAYOUT, _quantize, compiled=f"{__name__}.compiled", max_abs=127 * 65504.0),)
