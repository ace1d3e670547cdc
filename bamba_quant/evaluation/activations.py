"""How the inputs of a matrix are rounded: not at all, as llama.cpp's CPU backend rounds them, or as each file says.

Rounding them costs more than rounding Q8_0's weights (bamba-43m: a divergence of 4e-4 beside 2e-4), so a table that
llama-perplexity printed is matched only this way, and the loss of a file's weights alone is measured only without.
Which type goes with which: ggml-cpu.c, ``type_traits_cpu``; sums are this library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bamba_quant.errors import BambaQuantError, did_you_mean
from bamba_quant.evaluation.fp8_activations import has_scaled_products, with_fp8_activations
from bamba_quant.evaluation.stored_types import AS_COMPUTED, StoredTypes, has_scheme, q8_0, with_stored_types
from bamba_quant.inference.loading import LoadedModel
from bamba_quant.inference.weights import LazyWeights
from bamba_reference.tensors import stack_of
from bamba_reference.torch.backend import Backend

CHOICES = ("auto", "none", "checkpoint", "llama.cpp")


def resolve(activations: str, kinds: Iterable[str]) -> str:
    """ "auto" is "llama.cpp" where all models are GGUF files, so that the table is llama-perplexity's; else "none".

    Raises ``BambaQuantError`` for a value that is not in ``CHOICES``.
    """
    if activations not in CHOICES:
        raise BambaQuantError(
            f"unknown rounding of activations{did_you_mean(activations, CHOICES)}",
            where="--activations",
            found=activations,
            expected=", ".join(CHOICES),
        )
    if activations != "auto":
        return activations
    return "llama.cpp" if set(kinds) == {"gguf"} else "none"


def with_activations(
    backend: Backend,
    model: LoadedModel,
    activations: str,
    device: torch.device,
    dtype: torch.dtype,
    types: StoredTypes = AS_COMPUTED,
    seed: int = 0,
) -> Backend:
    """``backend`` for a model, with the inputs of each matrix rounded as ``activations`` (resolved) says.

    Cache and state are stored in ``types`` (``with_stored_types``).

    "checkpoint" rounds as the file's own runtime does: GGUF as llama.cpp, FP8 as its configuration says, on a GPU by
    scaled products if it supports them, its cache in FP8 where it has scales for that; inputs of other matrices are not
    rounded. The backend's name says what was
    done. Raises ``BambaQuantError`` for a rounding that is not implemented.
    """
    if activations == "checkpoint" and model.checkpoint.kind != "gguf":
        if has_scheme(model) and not types.cache:
            types = replace(types, cache="fp8")
        backend = with_fp8_activations(backend, model.weights, scaled=has_scaled_products(device, dtype))
    elif activations != "none":
        backend = with_llama_activations(backend, model.weights)
    return with_stored_types(backend, model, types, seed)


Rounding = Callable[[Tensor], Tensor]


def q8_k(x: Tensor) -> Tensor:
    """Blocks of 256 to eight bits under a float32 scale (ggml-quants.c, ``quantize_row_q8_K_ref``)."""
    blocks = x.float().unflatten(-1, (-1, 256))  # (…, n/256, 256)
    greatest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # with its sign
    inverse = torch.where(greatest != 0, -127 / greatest, 0)
    steps = (blocks * inverse).round().clamp(max=127)
    return (steps * torch.where(inverse != 0, 1 / inverse, 0)).flatten(-2).to(x.dtype)


def _through(dtype: torch.dtype) -> Rounding:
    return lambda x: x.to(dtype).to(x.dtype)


ROUNDINGS: dict[str, Rounding] = {
    "f32": lambda x: x,
    "f16": _through(torch.float16),
    "bf16": _through(torch.bfloat16),
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "nvfp4"), q8_0),
    **dict.fromkeys(
        ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s",
         "iq3_xxs", "iq3_s", "tq1_0", "tq2_0"), q8_k),
}  # fmt: skip


def with_llama_activations(backend: Backend, weights: LazyWeights) -> Backend:
    """``backend`` with the inputs of each matrix rounded as llama.cpp does for its stored type.

    Raises ``BambaQuantError`` for a type that llama.cpp does not have.
    """
    formats = {name: weights.info(name).format for name in weights}
    unknown = sorted(set(formats.values()) - ROUNDINGS.keys())
    if unknown:
        raise BambaQuantError(
            "llama.cpp's rounding of activations is not defined for this type",
            found=", ".join(unknown),
            expected=", ".join(ROUNDINGS),
            fix="evaluate with --activations none",
        )

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        stack, _ = stack_of(name)
        return backend.linear(ROUNDINGS[formats[stack]](x), weight, bias, name)

    def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
        return backend.head(ROUNDINGS[formats[name]](x), weight, name)

    return backend.with_linear(linear, name=f"{backend.name}, activations as llama.cpp's", head=head)
