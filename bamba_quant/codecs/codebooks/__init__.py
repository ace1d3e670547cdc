"""ggml's formats that this library reads and does not write, dequantized by gguf-py, or only lists."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.errors import FormatError

READ_ONLY = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "nvfp4")


def _codec(name: str) -> BlockCodec:
    ggml_type = GGMLQuantizationType[name.upper()]

    def read(raw: U8) -> F32:
        values: F32 = dequantize(raw, ggml_type).astype(np.float32, copy=False)
        return values

    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    return BlockCodec(
        name=name,
        ggml_type=ggml_type,
        block_size=block_size,
        block_bytes=block_bytes,
        dequantize=read,
        gpu=f"{__name__}.gpu",
    )


CODECS = tuple(_codec(name) for name in READ_ONLY)


def listed_format(ggml_type: int) -> BlockCodec:
    """A codec that is only listed: gguf-py knows its size, and its numbers are not read as weights.

    Raises ``FormatError`` for a type that gguf-py does not know.
    """
    if ggml_type not in GGMLQuantizationType._value2member_map_:
        raise FormatError(
            "a tensor has an unknown type",
            found=f"ggml type {ggml_type}",
            expected="a type of ggml that gguf-py lists",
        )
    known = GGMLQuantizationType(ggml_type)
    block_size, block_bytes = GGML_QUANT_SIZES[known]

    def refuse(*arrays: Any) -> NoReturn:
        raise FormatError(f"{known.name.lower()} is not a type that weights are read from or written to")

    return BlockCodec(
        name=known.name.lower(),
        ggml_type=ggml_type,
        block_size=block_size,
        block_bytes=block_bytes,
        dequantize=refuse,
        readable=False,
    )
