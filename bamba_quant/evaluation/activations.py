"""How what enters a matrix is rounded: not at all, as llama.cpp's CPU backend rounds it, or as each file has it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping

import torch

from bamba_quant.errors import BambaQuantError
from bamba_quant.evaluation.fp8_activations import has_scaled_products, with_fp8_activations
from bamba_quant.evaluation.llama_activations import with_llama_activations
from bamba_quant.inference.weights import LoadedModel
from bamba_reference.torch.backend import Backend

CHOICES = ("auto", "exact", "file", "llama.cpp")


def resolve(activations: str, kinds: Iterable[str]) -> str:
    """ "auto" is "llama.cpp" where all models are GGUF files, so that the table is llama-perplexity's; else "exact".

    Raises ``BambaQuantError`` for a word that is none of ``CHOICES``.
    """
    if activations not in CHOICES:
        raise BambaQuantError("no such activations", found=activations, expected=", ".join(CHOICES))
    if activations != "auto":
        return activations
    return "llama.cpp" if set(kinds) == {"gguf"} else "exact"


def with_activations(
    backend: Backend, model: LoadedModel, activations: str, device: torch.device, dtype: torch.dtype
) -> Backend:
    """``backend`` for a model, with what enters each matrix rounded as ``activations``, resolved, has it.

    "file" rounds as what runs a file would: a GGUF's as llama.cpp, FP8 as its configuration says, on a GPU by scaled
    products where these are to be had; whatever says nothing stays exact. The name tells what was done. Raises
    ``BambaQuantError`` for what cannot be rounded so.
    """
    if activations == "llama.cpp" or (activations == "file" and model.checkpoint.kind == "gguf"):
        return with_llama_activations(backend, model.weights)
    if activations == "file":
        _check_cache(model)
        return with_fp8_activations(backend, model.weights, scaled=has_scaled_products(device, dtype))
    return backend


def _check_cache(model: LoadedModel) -> None:
    quantization = model.checkpoint.metadata.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if scheme:
        raise BambaQuantError(
            "attention's cache is rounded in a way that is not emulated",
            where=model.checkpoint.path,
            found=f"kv_cache_scheme {reprlib.repr(scheme)}",
            expected="a cache that is not quantized",
            fix="evaluate with --activations exact",
        )
