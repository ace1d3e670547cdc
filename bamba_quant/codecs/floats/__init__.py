"""Plain floating point, rounded to nearest even; bfloat16 travels as ``ml_dtypes.bfloat16``."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from bamba_quant.codecs.arithmetic import quiet
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec, Dequantize, Quantize, block_methods

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)

# Half way between float16's largest number and the next step up, which rounding to even sends to infinity.
_FLOAT16_OVERFLOW = 65520.0


def to_float32(x: NDArray[Any]) -> F32:
    """float32, float16 or bfloat16 of any shape to float32, exactly."""
    if x.dtype == FLOAT32:
        return x
    if x.dtype == BFLOAT16:
        widened = x.view(np.uint16).astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    return x.astype(np.float32)


def to_bfloat16(x: F32) -> NDArray[Any]:
    """float32 without NaN to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    # Adding half an ulp less one, plus the last kept bit, carries exactly where nearest-even rounds up.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16).view(BFLOAT16)


def _quantize_f32(x: F32, importance: F32 | None = None) -> U8:
    return np.ascontiguousarray(x).view(np.uint8)


def _dequantize_f32(raw: U8) -> F32:
    return raw.view(np.float32)


@quiet
def _quantize_f16(x: F32, importance: F32 | None = None) -> U8:
    return x.astype(np.float16, order="C").view(np.uint8)


def _dequantize_f16(raw: U8) -> F32:
    return to_float32(raw.view(np.float16))


def _quantize_bf16(x: F32, importance: F32 | None = None) -> U8:
    return to_bfloat16(x).view(np.uint8)


def _dequantize_bf16(raw: U8) -> F32:
    return to_float32(raw.view(BFLOAT16))


def _plain(
    name: str,
    dtype: np.dtype[Any],
    quantize: Quantize,
    dequantize: Dequantize,
    max_abs: float = math.inf,
    compiled: str = f"{__name__}.compiled",
) -> BlockCodec:
    return BlockCodec(
        name=name,
        ggml_type=GGMLQuantizationType[name.upper()],
        block_size=1,
        block_bytes=dtype.itemsize,
        dequantize=dequantize,
        methods=block_methods(name, (1, dtype.itemsize), quantize, compiled),
        dtype=dtype,
        max_abs=max_abs,
    )


_BFLOAT16_OVERFLOW = np.float64(2.0**128 - 2.0**119)
CODECS = (
    _plain("f32", FLOAT32, _quantize_f32, _dequantize_f32, compiled=""),  # nothing to compute
    _plain("f16", FLOAT16, _quantize_f16, _dequantize_f16, float(np.nextafter(_FLOAT16_OVERFLOW, 0))),
    _plain("bf16", BFLOAT16, _quantize_bf16, _dequantize_bf16, float(np.nextafter(_BFLOAT16_OVERFLOW, 0))),
)
