"""TQ1_0, TQ2_0: 256 weights as -1, 0 or 1 under one float16 scale, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import half_bytes, quiet, reciprocal, round_half_away, truncate
from bamba_quant.codecs.arrays import F32, I32, U8
from bamba_quant.codecs.blocks import BlockCodec, block_codec, block_methods
from bamba_quant.codecs.fields import Fields
from bamba_quant.codecs.layout import Bits, BlockLayout, Field, from_blocks, halves, to_blocks

BLOCK = 256
# TQ1_0 keeps five trits a byte in 32 bytes, then in 16, then four a byte in 4: (bytes, trits in each).
RUNS = ((32, 5), (16, 5), (4, 4))
TQ2_0 = BlockLayout(
    block=BLOCK, block_bytes=66, group=BLOCK, codes=Field((Bits(0, 2, BLOCK, run=32),), zero=1), d=64
)
_COMPILED = f"{__name__}.compiled"


def _trits(flat: F32) -> tuple[F32, I32]:
    """Scale (n_blocks,) and trits 0, 1, 2 (256, n_blocks); 1 where the scale's inverse overflows."""
    d = np.abs(flat).max(axis=0)
    return d, truncate(round_half_away(flat * reciprocal(d))) + np.int32(1) & 3


@quiet
def _quantize_tq1(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:2316; importance changes nothing there either."""
    d, trits = _trits(to_blocks(rows, BLOCK))
    runs, first = [], 0
    for size, count in RUNS:
        digits = trits[first : first + size * count].reshape(count, size, -1)
        first += size * count
        number = np.zeros(digits.shape[1:], np.int32)
        for digit in digits:
            number = number * 3 + digit
        number *= 3 ** (5 - count)
        # The byte holds the number over 3^5 as a fraction of 256, rounded up, so that multiplying by 3
        # reads a trit.
        runs.append(((number * 256 + 242) // 243).astype(np.uint8))
    return from_blocks(rows.shape[1] // BLOCK, *runs, half_bytes(d))


def _dequantize_tq1(raw: U8) -> F32:
    blocks = to_blocks(raw, 54)
    trits, first = [], 0
    for size, count in RUNS:
        packed = blocks[first : first + size]
        first += size
        trits += [(packed * np.uint8(3**n)).astype(np.uint16) * 3 >> 8 for n in range(count)]
    return from_blocks(
        raw.shape[1] // 54,
        (np.concatenate(trits).astype(np.float32) - np.float32(1)) * halves(blocks[52:]).astype(np.float32),
    )


@quiet
def _quantize_tq2(rows: F32, importance: F32 | None = None) -> U8:
    """ggml-quants.c:2382; importance changes nothing there either."""
    d, trits = _trits(to_blocks(rows, BLOCK))
    return TQ2_0.packed(rows.shape[1] // BLOCK, Fields(trits.astype(np.int8) - np.int8(1), d))


CODECS = (
    BlockCodec(
        name="tq1_0",
        ggml_type=GGMLQuantizationType.TQ1_0,
        block_size=BLOCK,
        block_bytes=54,
        dequantize=_dequantize_tq1,
        methods=block_methods("tq1_0", (BLOCK, 54), _quantize_tq1, _COMPILED),
        max_abs=65504.0,
        gpu=f"{__name__}.gpu",
    ),
    block_codec("tq2_0", TQ2_0, _quantize_tq2, compiled=_COMPILED, max_abs=65504.0, with_fields=False),
)
