"""TQ1_0, TQ2_0: 256 weights as -1, 0 or 1 under one float16 scale, byte for byte as ggml writes them."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from bamba_quant.codecs.arithmetic import half_bytes, quiet, reciprocal, round_half_away, truncate
from bamba_quant.codecs.arrays import F32, I32, U8
from bamba_quant.codecs.blocks import BlockCodec, Dequantize, Quantize, block_methods
from bamba_quant.codecs.layout import from_blocks, halves, pack_two_bit_codes, to_blocks, unpack_two_bit_codes

BLOCK = 256
# TQ1_0 keeps five trits a byte in 32 bytes, then in 16, then four a byte in 4: (bytes, trits in each).
RUNS = ((32, 5), (16, 5), (4, 4))


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
    return from_blocks(rows.shape[1] // BLOCK, pack_two_bit_codes(trits.astype(np.uint8)), half_bytes(d))


def _dequantize_tq2(raw: U8) -> F32:
    blocks = to_blocks(raw, 66)
    trits = unpack_two_bit_codes(blocks[:64]).astype(np.float32)
    return from_blocks(raw.shape[1] // 66, (trits - np.float32(1)) * halves(blocks[64:]).astype(np.float32))


def _codec(name: str, block_bytes: int, quantize: Quantize, dequantize: Dequantize) -> BlockCodec:
    return BlockCodec(
        name=name,
        ggml_type=GGMLQuantizationType[name.upper()],
        block_size=BLOCK,
        block_bytes=block_bytes,
        dequantize=dequantize,
        methods=block_methods(name, (BLOCK, block_bytes), quantize, f"{__name__}.compiled"),
        max_abs=65504.0,
    )


CODECS = (
    _codec("tq1_0", 54, _quantize_tq1, _dequantize_tq1),
    _codec("tq2_0", 66, _quantize_tq2, _dequantize_tq2),
)
