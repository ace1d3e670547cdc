"""ggml's formats that this library reads and does not write, dequantized by gguf-py, or only lists."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bamba_quant.codecs.base import F32, U8, Format, register
from bamba_quant.errors import FormatError

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


def listed_format(ggml_type: int) -> Format:
    """A format whose size gguf-py knows and whose numbers are not weights here: ``inspect`` lists it.

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

    return Format(
        known.name.lower(), ggml_type, block_size, block_bytes, refuse, refuse, writable=False, readable=False
    )
