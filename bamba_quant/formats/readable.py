"""ggml's formats that this library reads and does not write, dequantized by gguf-py."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGML
from gguf.quants import dequantize

from bamba_quant.errors import FormatError
from bamba_quant.formats.base import F32, U8, Format, register

READ_ONLY = (
    GGML.IQ1_S, GGML.IQ1_M, GGML.IQ2_XXS, GGML.IQ2_XS, GGML.IQ2_S, GGML.IQ3_XXS, GGML.IQ3_S, GGML.NVFP4,
)  # fmt: skip


def _register(ggml_type: GGML) -> Format:
    name = ggml_type.name.lower()
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]

    def refuse(x: F32, importance: F32 | None = None) -> NoReturn:
        raise FormatError(f"{name} can be read and not written", fix="choose one of the writable formats")

    def read(raw: U8) -> F32:
        values: F32 = dequantize(raw, ggml_type).astype(np.float32, copy=False)
        return values

    return register(Format(name, ggml_type, block_size, block_bytes, refuse, read, writable=False))


for _ggml_type in READ_ONLY:
    _register(_ggml_type)
