"""llama.cpp as an oracle, through llama-cpp-python: logits, tokens, quantization; missing in CI it fails the test."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Of one test process: ggml's threads spin at barriers, so that more of them than processors make all slower.
_THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def llama_cpp() -> Any:
    """The module; without it a test fails in CI and is skipped elsewhere."""
    try:
        import llama_cpp
    except ImportError:
        if os.environ.get("CI"):
            pytest.fail("llama-cpp-python is missing, and in CI it must not be")
        pytest.skip("llama-cpp-python is not installed (make test installs it)")
    return llama_cpp


@contextmanager
def _loaded(file: Path, **options: Any) -> Iterator[Any]:
    llama = llama_cpp().Llama(str(file), n_gpu_layers=0, verbose=False, **options)
    try:
        yield llama
    finally:
        llama.close()


def logits(file: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits at every position, float32 of shape (len(tokens), vocabulary), with float32 caches."""
    return chunk_logits(file, [tokens])[0]


def chunk_logits(file: Path, chunks: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """``logits`` of several texts of one length, each from an empty state, the file loaded once."""
    module = llama_cpp()
    length = len(chunks[0])
    found = []
    with _loaded(
        file,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=_THREADS,
        n_threads_batch=_THREADS,
        logits_all=True,
        type_k=module.GGML_TYPE_F32,
        type_v=module.GGML_TYPE_F32,
        flash_attn=False,
    ) as llama:
        for chunk in chunks:
            llama.reset()
            module.llama_memory_clear(module.llama_get_memory(llama.ctx), True)
            llama.eval(list(chunk))
            found.append(np.array(llama.scores[:length], dtype=np.float32))
    return found


def tokenize(file: Path, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of each text behind BOS; ``special`` parses control tokens that the text spells out."""
    with _loaded(file, vocab_only=True) as llama:
        return [llama.tokenize(text.encode("utf-8"), add_bos=True, special=special) for text in texts]


def quantize(
    source: Path,
    target: Path,
    file_type: int,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    tensor_types: Sequence[tuple[str, int]] = (),
    **options: Any,
) -> None:
    """llama-quantize's own conversion of ``source`` to ``target``; ``file_type`` is a llama_ftype.

    ``imatrix`` maps tensor names to importance; ``options`` are fields of llama_model_quantize_params.
    """
    module = llama_cpp()
    params = module.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = _THREADS
    for name, value in options.items():
        setattr(params, name, value)
    if imatrix is not None:
        entries = (module.llama_model_imatrix_data * (len(imatrix) + 1))()
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if tensor_types:
        overrides = (module.llama_model_tensor_override * (len(tensor_types) + 1))()
        for override, (pattern, ggml_type) in zip(overrides, tensor_types, strict=False):
            override.pattern, override.type = pattern.encode(), ggml_type
        overrides[len(tensor_types)].type = -1
        params.tt_overrides = overrides
    assert module.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
