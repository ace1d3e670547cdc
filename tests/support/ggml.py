"""ggml's own quantizers, called in llama-cpp-python's library: the oracle for every byte the formats write."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bamba_quant.formats import Format
from bamba_quant.formats.base import F32, U8

_FLOATS = ctypes.POINTER(ctypes.c_float)


@cache
def library() -> ctypes.CDLL:
    """libggml-base. Where it is missing the test is skipped; under CI that is a failure."""
    package = importlib.util.find_spec("llama_cpp")
    found = [] if package is None else sorted(Path(package.origin).parent.glob("lib/libggml-base.*"))
    if not found:
        missing = "llama-cpp-python's libggml-base is not installed (pip install '.[test]')"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS,
    )  # fmt: skip
    return ggml


def quantize(number_format: Format, x: F32, importance: F32 | None = None) -> U8:
    """``ggml_quantize_chunk`` of x (rows, n) with importance (n,) as its imatrix, or NULL: (rows, row_bytes)."""
    x = np.ascontiguousarray(x, np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    out = np.zeros((len(x), number_format.row_bytes(x.shape[1])), np.uint8)
    library().ggml_quantize_chunk(
        int(number_format.ggml_type),
        x.ctypes.data_as(_FLOATS),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        *x.shape,
        None if importance is None else importance.ctypes.data_as(_FLOATS),
    )
    return out


def dequantize(number_format: Format, raw: U8, columns: int) -> F32:
    """``dequantize_row_*`` of raw (rows, row_bytes): float32 (rows, columns)."""
    raw = np.ascontiguousarray(raw)
    out = np.empty((len(raw), columns), np.float32)
    name = number_format.name.upper().replace("_K", "_k").lower().replace("_k", "_K")
    function = getattr(library(), f"dequantize_row_{name}")
    function.restype = None
    function(
        raw.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size)
    )
    return out
