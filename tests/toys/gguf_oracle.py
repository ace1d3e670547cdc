"""gguf-py's dequantization of Q1_0, which gguf-py itself does not have."""

from __future__ import annotations

import gguf
import numpy as np


class SignsOf128(gguf.quants.__Quant, qtype=gguf.GGMLQuantizationType.Q1_0):
    """Registers itself; each sign times the block's float16 number."""

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        d, bits = blocks[:, :2].view(np.float16).astype(np.float32), blocks[:, 2:, None]
        signs = (bits >> np.arange(8, dtype=np.uint8) & 1).reshape(len(blocks), -1)
        return np.where(signs, d, -d)
