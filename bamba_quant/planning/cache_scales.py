"""The scales of an FP8 cache in a quantized directory: a tensor for the keys and one for the values of each layer.

compressed-tensors 0.20 registers ``k_scale`` and ``v_scale`` in the attention module for a ``kv_cache_scheme``
(quantization/lifecycle/initialize.py, ``initialize_attn_qparams``); vLLM reads the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bamba_quant.errors import PlanError
from bamba_quant.recipes.matrices import MatrixCandidate
from bamba_reference.tensors import layer_prefix

NOTE = (
    "the scales of keys and values are for transformers and for vLLM with --kv-cache-dtype fp8. See its log: a class "
    "that does not load k_scale and v_scale stops (Bamba's of 2025) or stores both unscaled"
)


def cache_scheme(configuration: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """``configuration`` with the scheme of an FP8 cache. Raises ``PlanError`` unless it is compressed-tensors'."""
    if configuration["quant_method"] != "compressed-tensors":
        raise PlanError(
            "this form of directory has no scales of a cache",
            found=f"--kv-cache fp8 with scheme {scheme}, quant_method {configuration['quant_method']}",
            expected="quant_method compressed-tensors",
            fix="choose a scheme of compressed-tensors (--format), or leave out --kv-cache",
        )
    absent = dict.fromkeys(("actorder", "block_structure", "group_size", "scale_dtype", "zp_dtype"))
    args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return {**configuration, "kv_cache_scheme": absent | args | {"observer": "minmax", "observer_kwargs": {}}}


def scale_tensors(
    candidates: Sequence[MatrixCandidate], scales: Mapping[str, tuple[float, float]]
) -> dict[str, bytes]:
    """The tensors' bfloat16 numbers by their names, from the scales by each layer's prefix, 1 where there is none.

    A scale is rounded up, so that the largest number that was seen is not cut. Raises ``PlanError`` for a model without
    attention.
    """
    found: dict[str, bytes] = {}
    for candidate in candidates:
        if "attn_k" in candidate.roles and candidate.layer is not None:
            for part, scale in zip("kv", scales.get(layer_prefix(candidate.layer), (1.0, 1.0)), strict=True):
                bits = (int(np.float32(scale).view(np.uint32)) + 0xFFFF) >> 16
                found[f"{candidate.module.removesuffix('k_proj')}{part}_scale"] = bits.to_bytes(2, "little")
    if not found:
        raise PlanError("the model has no attention layer, so no cache to scale", found="--kv-cache fp8")
    return found
