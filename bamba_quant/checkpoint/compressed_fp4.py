"""compressed-tensors' FP4 weights: NVFP4, with block scales and a global scale for the matrix, and MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler
from bamba_quant.checkpoint.base import StoredTensor, read_raw
from bamba_quant.checkpoint.dequantize import Float4Dequantizer
from bamba_quant.checkpoint.packed import Activations, ScaleTensor
from bamba_quant.codecs.arrays import F32, Array
from bamba_quant.codecs.fp4 import E8M0
from bamba_quant.errors import repr_short

_KEYS = ("num_bits", "strategy", "group_size", "symmetric")
_NVFP4, _MXFP4 = (4, "tensor_group", 16, True), (4, "group", 32, True)


def assemble_float4(stored: WeightAssembler, module: str, codes: StoredTensor, weights: Mapping[str, Any],
                    activations: Activations | None) -> None:  # fmt: skip
    """Assemble a weight of ``codes``, uint8 (rows, columns/2), as compressed-tensors decompresses it.

    A step is a scale in float32, over the global scale where there is one; the product with a code is rounded to
    bfloat16. Raises ``CheckpointError`` naming what cannot be read.
    """
    name = f"{module}.weight"
    form = tuple(weights.get(key, True if key == "symmetric" else None) for key in _KEYS)
    if form not in (_NVFP4, _MXFP4) or [type(value) for value in form] != [int, str, int, bool]:
        found = ", ".join(f"{key} {repr_short(value)}" for key, value in zip(_KEYS, form, strict=True))
        raise stored.unsupported(
            name, found, "FP4 in NVFP4's groups of 16 or MXFP4's groups of 32, symmetric"
        )
    group = int(form[2])
    if len(codes.shape) != 2 or not codes.elements or 2 * codes.shape[1] % group:
        raise stored.unsupported(
            name, f"codes of shape {codes.shape}", f"a matrix with rows of whole groups of {group}"
        )
    for part in ("weight_zero_point", "weight_g_idx"):
        if stored.get(f"{module}.{part}") is not None:
            raise stored.unsupported(name, part, "scales alone, of groups in order")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    stored.take(f"{module}.weight_packed", ("u8",))
    dtype = E4M3 if form == _NVFP4 else "u8"
    scale = stored.take(f"{module}.weight_scale", (dtype,), ((rows, columns // group),))
    if form == _NVFP4:
        whole = stored.take(f"{module}.weight_global_scale", ("f32",), ((1,), ()))
        divisor = read_raw(whole).view(np.float32).reshape(-1)[0]
        if not 2.0**-126 <= divisor < np.inf:
            raise stored.unsupported(
                f"{module}.weight_global_scale", divisor, "a positive number of float32, not subnormal"
            )
        steps = ScaleTensor(
            scale,
            unpack=partial(_divided, divisor=divisor),
            pack=partial(_multiplied, divisor=divisor),
            beside=whole,
        )
    else:
        steps = ScaleTensor(scale, unpack=_powers, pack=_exponents)
    described = "nvfp4a16" if form == _NVFP4 else "mxfp4a16"
    stored.add(
        name, described, (rows, columns), Float4Dequantizer(group), codes, steps, activations=activations
    )


def _divided(scales: Array, count: int, divisor: np.float32) -> F32:
    found: F32 = scales.astype(np.float32) / divisor
    return found


def _multiplied(steps: F32, divisor: np.float32) -> Array:
    return (steps * divisor).astype(ml_dtypes.float8_e4m3fn)


def _powers(exponents: Array, count: int) -> F32:
    return E8M0[exponents]


def _exponents(steps: F32) -> Array:
    return np.searchsorted(E8M0, steps).astype(np.uint8)
