"""Q8_0: 32 weights as signed bytes under one float16 scale, byte for byte as ggml writes it."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import as_bytes, half_bytes, quiet, reciprocal, round_half_away, truncate
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import block_codec
from bamba_quant.codecs.fields import BlockFields, BlockLayout
from bamba_quant.codecs.layout import from_blocks, halves, to_blocks

BLOCK = 32


@quiet
def _quantize(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:276; importance changes nothing there either. Integers use the scale before rounding."""
    x = to_blocks(rows, BLOCK)  # (32, n_blocks)
    d = np.abs(x).max(axis=0) / np.float32(127)
    return from_blocks(
        rows.shape[1] // BLOCK, half_bytes(d), as_bytes(truncate(round_half_away(x * reciprocal(d))))
    )


FIELDS = BlockLayout(
    block=BLOCK,
    block_bytes=34,
    group=BLOCK,
    codes=(-128, 127),
    split=lambda blocks: BlockFields(blocks[2:].view(np.int8), halves(blocks[:2])),
    join=lambda fields: np.concatenate((half_bytes(fields.d), fields.codes.view(np.uint8))),
)
CODECS = (
    block_codec(
        "q8_0",
        GGMLQuantizationType.Q8_0,
        FIELDS,
        _quantize,
        compiled=f"{__name__}.compiled",
        max_abs=127 * 65504.0,
    ),
)
