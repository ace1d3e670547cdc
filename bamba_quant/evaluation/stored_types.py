"""The types in which keys, values and recurrent states are stored between tokens, and what storing them so changes.

Keys are rounded behind the rotary embedding and values as they are, both before any token reads them; queries are not
rounded. "fp8" is e4m3 under one scale for the keys and one for the values of a layer, those that the checkpoint was
calibrated with, else 1, as vLLM stores them (``--kv-cache-dtype fp8``). "int8" has a scale for each token and head,
as vLLM's ``int8_per_token_head``; "q8_0" is llama.cpp's (``--cache-type-k q8_0``). States: ``torch.stored_state``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from bamba_quant.checkpoint.base import StoredTensor, read_tensor
from bamba_quant.checkpoint.compressed_tensors import CACHE_SCALE
from bamba_quant.errors import BambaQuantError, did_you_mean, join_names, repr_short
from bamba_quant.inference.loading import LoadedModel
from bamba_reference.tensors import layer_prefix
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.ops import wide
from bamba_reference.torch.stored_state import STATE_NAMES, state_rounding

CACHE_TYPES = ("f32", "bf16", "fp16", "fp8", "int8", "q8_0")
_E4M3_MOST = 448.0
_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass(frozen=True)
class StoredTypes:
    """The types of keys and values and of states; "" where they stay as computed."""

    cache: str = ""
    state: str = ""

    def __str__(self) -> str:
        """Such as "cache fp8, state fp16-stochastic"."""
        named = {"cache": self.cache, "state": self.state}
        return ", ".join(f"{what} {name}" for what, name in named.items() if name)


AS_COMPUTED = StoredTypes()


def combinations(cache_type: str, state_type: str) -> tuple[StoredTypes, ...]:
    """Every combination of two comma-separated lists of types, of which either may be empty.

    Raises ``BambaQuantError`` for an unknown type.
    """
    caches, states = (
        _names(given, known, option)
        for given, known, option in (
            (cache_type, CACHE_TYPES, "--cache-type"),
            (state_type, STATE_NAMES, "--state-type"),
        )
    )
    return tuple(StoredTypes(*each) for each in product(caches, states))


def _names(given: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in given.split(","))) if given else ("",)
    for name in names if given else ():
        if name not in known:
            what = f"unknown type{did_you_mean(name, known)}"
            raise BambaQuantError(what, where=option, found=name or given, expected=", ".join(known))
    return names


def with_stored_types(backend: Backend, model: LoadedModel, types: StoredTypes, seed: int) -> Backend:
    """``backend`` for ``model``, storing keys, values and states in ``types``; ``seed`` is that of stochastic rounding.

    Raises ``BambaQuantError`` where the model keeps nothing of the kind, and for scales that do not fit.
    """
    blocks = {block for layer in model.config.layers for block in (*layer.blocks, *layer.feed_forward)}
    for name, needed, what in (
        (types.cache, {"attention"}, "no attention layer, so no keys and values"),
        (types.state, {"mamba1", "mamba2"}, "no Mamba layer, so no recurrent state"),
    ):
        if name and not blocks & needed:
            raise BambaQuantError(f"the model has {what} to store", where=model.checkpoint.path, found=name)
    if types.cache not in ("", "f32"):
        backend = replace(backend, cached=_cached(types.cache, model))
    if types.state:
        backend = replace(backend, state_rounding=state_rounding(types.state, seed))
    if not str(types):
        return backend
    named = f"{types} (seed {seed})" if types.state.endswith("-stochastic") else str(types)
    return replace(backend, name=f"{backend.name}, {named}")


class _Cached:
    """``Backend.cached`` for one type of numbers; ``scales`` are those of keys and values by the layer's prefix."""

    def __init__(self, name: str, scales: Mapping[str, tuple[float, float]]) -> None:
        self.name, self.scales = name, scales

    def __call__(self, k: Tensor, v: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        scales = self.scales.get(layer, (1.0, 1.0))
        return rounded(k, self.name, scales[0]), rounded(v, self.name, scales[1])


def rounded(x: Tensor, name: str, scale: float = 1.0) -> Tensor:
    """Keys or values x (…, E) as a cache of the type ``name`` stores them, in x's dtype; ``scale`` is that of "fp8".

    What is beyond the largest number of "fp8" becomes that number.
    """
    if name in ("bf16", "fp16"):
        return x.to(torch.bfloat16 if name == "bf16" else torch.float16).to(x.dtype)
    if name == "q8_0":
        return q8_0(x)
    exact = x.to(wide(x.dtype))
    if name == "fp8":
        codes = (exact / scale).clamp(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn)
        return (codes.to(exact.dtype) * scale).to(x.dtype)
    step = exact.abs().amax(-1, keepdim=True) / 127  # (…, 1)
    return (torch.where(step > 0, exact / step, 0).round() * step).to(x.dtype)


def q8_0(x: Tensor) -> Tensor:
    """Blocks of 32 to eight bits under a float16 scale (ggml-cpu/arch/x86/quants.c, ``quantize_row_q8_0``)."""
    blocks = x.float().unflatten(-1, (-1, 32))  # (…, n/32, 32)
    greatest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(greatest > 0, 127 / greatest, 0)
    return ((blocks * inverse).round() * (greatest / 127).half().float()).flatten(-2).to(x.dtype)


def _cached(name: str, model: LoadedModel) -> _Cached:
    if name == "q8_0" and model.config.head_dim % 32:
        raise BambaQuantError(
            "a head's keys do not divide into blocks of 32",
            where=model.checkpoint.path,
            found=f"heads of {model.config.head_dim}, cache type q8_0",
            expected="a multiple of 32",
            fix="take --cache-type int8",
        )
    return _Cached(name, cache_scales(model) if name == "fp8" else {})


def has_scheme(model: LoadedModel) -> bool:
    """Whether the checkpoint asks for a cache in FP8. Raises ``BambaQuantError`` for a cache of another type."""
    quantization = model.checkpoint.metadata.get("quantization_config")
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")  # of compressed-tensors, of ModelOpt
    schemes = [quantization.get(key) for key in keys] if isinstance(quantization, Mapping) else []
    if not (scheme := next(filter(None, schemes), None)):
        return False
    found = scheme if isinstance(scheme, Mapping) else {}
    if scheme != "FP8" and any(found.get(key) != value for key, value in _SCHEME.items()):
        raise BambaQuantError(
            "this rounding of the attention cache is not supported",
            where=model.checkpoint.path,
            found=f"kv_cache_scheme {repr_short(scheme)}",
            expected=", ".join(f"{key} {value}" for key, value in _SCHEME.items()),
            fix="evaluate with --activations none",
        )
    return True


def cache_scales(model: LoadedModel) -> dict[str, tuple[float, float]]:
    """The scales of keys and values that a checkpoint stores, by the layer's prefix; empty where it stores none.

    Raises ``BambaQuantError`` for a layer without both, and for a scale that is not one positive number.
    """
    found: dict[str, float] = {}
    for name, tensor in model.checkpoint.cache_scales.items():
        if match := CACHE_SCALE.search(name):
            found[layer_prefix(int(match[1])) + match[2]] = _number(tensor)
    layers = [layer_prefix(i) for i, layer in enumerate(model.config.layers) if "attention" in layer.blocks]
    missing = [layer + part for layer in layers for part in "kv" if layer + part not in found]
    if found and missing:
        raise BambaQuantError(
            "scales of the attention cache are missing",
            where=model.checkpoint.path,
            found=f"no scale of {join_names(missing, 4)}",
            expected="k_scale and v_scale of every attention layer, or of none",
        )
    return {layer: (found[layer + "k"], found[layer + "v"]) for layer in layers} if found else {}


def _number(tensor: StoredTensor) -> float:
    value = float(read_tensor(tensor).reshape(-1)[0]) if tensor.elements == 1 else 0.0
    if not 0 < value < float("inf"):
        raise BambaQuantError(
            "a scale of the attention cache is not one positive number",
            where=f"{tensor.file}, tensor {tensor.name}",
            found=value if tensor.elements == 1 else f"shape {tensor.shape}",
        )
    return value
