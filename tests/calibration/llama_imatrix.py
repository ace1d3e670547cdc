"""llama-imatrix over llama.cpp's own graph: what its ``collect_imatrix`` adds up, by the scheduler's callback."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.ggml import library
from tests.support.llama import llama_cpp

_F32, _LEAST_ROWS = 0, 16


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h)."""


_Tensor._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]  # fmt: skip


def collect_imatrix(file: Path, chunks: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Σ a² (matrices, columns) in float64, and counts (matrices,), by tensor, the output included."""
    module = llama_cpp()
    product, products_by_expert = map(_operation, ("MUL_MAT", "MUL_MAT_ID"))
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def watch(pointer: int, ask: bool, _: Any) -> bool:
        tensor = _Tensor.from_address(pointer)
        stacked = tensor.op == products_by_expert
        if not (stacked or tensor.op == product):
            return False
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if not stacked and (
            x.ne[1] < _LEAST_ROWS or x.type != _F32 or not name.startswith(("blk.", "output.weight"))
        ):
            return False
        if not ask:
            matrices = weight.ne[2] if stacked else 1
            squares, counts = found.setdefault(
                name, (np.zeros((matrices, x.ne[0])), np.zeros(matrices, np.int64))
            )
            for expert, values in _rows(x, tensor.src[2].contents if stacked else None):
                squares[expert] += np.square(values.astype(np.float64))
                counts[expert] += 1
        return True

    callback = module.ggml_backend_sched_eval_callback(watch)
    model = module.llama_model_load_from_file(str(file).encode(), module.llama_model_default_params())
    params = module.llama_context_default_params()
    length = chunks.shape[1]
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.type_k = params.type_v = module.GGML_TYPE_F32
    params.flash_attn_type = module.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cb_eval = callback
    context = module.llama_init_from_model(model, params)
    batch = module.llama_batch_init(length, 0, 1)
    try:
        for chunk in chunks:
            module.llama_memory_clear(module.llama_get_memory(context), True)
            batch.n_tokens = length
            for place, token in enumerate(chunk.tolist()):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
            assert module.llama_decode(context, batch) == 0
    finally:
        module.llama_batch_free(batch)
        module.llama_free(context)
        module.llama_model_free(model)
    return found


def _rows(x: _Tensor, ids: _Tensor | None) -> Iterator[tuple[int, np.ndarray]]:
    """What enters each matrix, row after row, with the matrix's number."""
    values = _view(x, np.float32)  # (ne3, ne2, ne1, ne0)
    if ids is None:
        for row in values.reshape(-1, x.ne[0]):
            yield 0, row
        return
    chosen = _view(ids, np.int32)[0, 0]  # (tokens, experts used)
    for token, row in enumerate(chosen):
        for place, expert in enumerate(row.tolist()):
            yield expert, values[0, token, place % x.ne[1]]


def _view(tensor: _Tensor, dtype: Any) -> np.ndarray:
    """The elements (ne3, ne2, ne1, ne0), as the strides have them."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + strides[-1]
    raw = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, dtype, raw, strides=strides)


def _operation(name: str) -> int:
    name_of = library().ggml_op_name
    name_of.restype = ctypes.c_char_p
    return next(number for number in range(200) if name_of(number) == name.encode())
