"""ggml's formats that this library reads and does not write, dequantized by gguf-py."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bamba_quant.errors import FormatError
from bamba_quant.formats.base import F32, U8, Format, register

READ_ONLY = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "nvfp4")


def _register(name: str) -> Format:
    ggml_type = GGMLQuantizationType[name.upper()]
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]

    def refuse(x: F32, importance: F32 | None = None) -> NoReturn:
        raise FormatError(f"{name} can be read and not written", fix="choose one of the writable formats")

    def read(raw: U8) -> F32:
        values: F32 = dequantize(raw, ggml_type).astype(np.float32, copy=False)
        return values

    return register(Format(name, ggml_type, block_size, block_bytes, refuse, read, writable=False))


for _name in READ_ONLY:
    _register(_name)
