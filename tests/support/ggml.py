"""ggml's own quantizers, called in llama-cpp-python's library: the oracle for every byte written."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bamba_quant.codecs import BlockCodec
from bamba_quant.codecs.arrays import F32, U8

_FLOATS = ctypes.POINTER(ctypes.c_float)
_DEQUANTIZED_BY_ROW = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}


@cache
def library() -> ctypes.CDLL:
    """libggml-base. Where it is missing the test is skipped; under CI that is a failure."""
    path = library_path()
    if path is None:
        missing = "llama-cpp-python's libggml-base is not installed (pip install '.[test]')"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS,
    )  # fmt: skip
    return ggml


def library_path() -> Path | None:
    """Where llama-cpp-python keeps libggml-base, without importing it; None where it is not installed."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        return None
    return next(iter(sorted((Path(package.origin).parent / "lib").glob("libggml-base.*"))), None)


def quantize(codec: BlockCodec, x: F32, importance: F32 | None = None) -> U8:
    """``ggml_quantize_chunk`` of x (rows, n) with importance (n,) or NULL: uint8 (rows, row_bytes)."""
    x = np.ascontiguousarray(x, np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    out = np.zeros((len(x), codec.row_bytes(x.shape[1])), np.uint8)
    library().ggml_quantize_chunk(
        int(codec.ggml_type),
        x.ctypes.data_as(_FLOATS),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        *x.shape,
        None if importance is None else importance.ctypes.data_as(_FLOATS),
    )
    return out


def dequantize(codec: BlockCodec, raw: U8, columns: int) -> F32:
    """ggml's float32 (rows, columns) of raw (rows, row_bytes)."""
    raw = np.ascontiguousarray(raw)
    out = np.empty((len(raw), columns), np.float32)
    stem, k, _ = codec.name.partition("_k")
    name = _DEQUANTIZED_BY_ROW.get(codec.name, f"dequantize_row_{stem}{k.upper()}")
    function = getattr(library(), name)
    function.restype = None
    function(
        raw.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size)
    )
    return out
