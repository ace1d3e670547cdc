"""Q1_0: the signs of 128 weights, and their mean magnitude as float16, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np

from bamba_quant.codecs.arithmetic import quiet, serial_sum
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, to_blocks

BLOCK = 128
LAYOUT = BlockLayout(
    block=BLOCK,
    block_bytes=18,
    group=BLOCK,
    d=0,  # a float16 at byte 0
    codes=Field((Bits(2, 1, BLOCK),)),  # 128 codes of 1 bit from byte 2 on
    table=np.array([-1, 1], np.float32),
)


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c, quantize_row_q1_0_ref; importance changes nothing there either."""
    x = to_blocks(rows, BLOCK)  # (128, n_blocks)
    d = serial_sum(np.abs(x)) / np.float32(BLOCK)
    return LAYOUT.packed(rows.shape[1] // BLOCK, Fields((x >= 0).astype(np.uint8), d))


CODECS = (block_codec("q1_0", LAYOUT, _quantize, max_abs=65504.0),)
