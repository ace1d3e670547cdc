"""Q1_0: the signs of 128 weights, and their mean magnitude as float16, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import half_bytes, quiet, serial_sum
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import BlockFields, BlockLayout
from bamba_quant.codecs.layout import from_blocks, halves, to_blocks

BLOCK = 128


def _joined(codes: U8, d: F32) -> U8:
    return np.concatenate((half_bytes(d), np.packbits(codes, axis=0, bitorder="little")))


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c, quantize_row_q1_0_ref; importance changes nothing there either."""
    x = to_blocks(rows, BLOCK)  # (128, n_blocks)
    d = serial_sum(np.abs(x)) / np.float32(BLOCK)
    return from_blocks(rows.shape[1] // BLOCK, _joined((x >= 0).astype(np.uint8), d))


FIELDS = BlockLayout(
    block=BLOCK,
    block_bytes=2 + BLOCK // 8,
    group=BLOCK,
    codes=(0, 1),
    split=lambda blocks: BlockFields(
        np.unpackbits(blocks[2:], axis=0, bitorder="little"), halves(blocks[:2])
    ),
    join=lambda fields: _joined(fields.codes, fields.d),
    table=np.array([-1, 1], np.float32),
)
CODECS = (block_codec("q1_0", GGMLQuantizationType.Q1_0, FIELDS, _quantize, max_abs=65504.0),)
