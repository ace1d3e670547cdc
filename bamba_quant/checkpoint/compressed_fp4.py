"""compressed-tensors' FP4 weights: NVFP4, with block scales and a global scale for the matrix, and MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
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
    packed = f"{module}.weight_packed"
    if form == _NVFP4:
        add_nvfp4(stored, module, codes, packed, "weight_global_scale", False, activations)
        return
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    stored.take(packed, ("u8",))
    scale = stored.take(f"{module}.weight_scale", ("u8",), ((rows, columns // group),))
    steps = ScaleTensor(scale, unpack=_powers, pack=_exponents)
    stored.add(
        name, "mxfp4a16", (rows, columns), Float4Dequantizer(group), codes, steps, activations=activations
    )


def add_nvfp4(stored: WeightAssembler, module: str, codes: StoredTensor, packed: str, part: str, multiplies: bool,
              activations: Activations | None) -> None:  # fmt: skip
    """Assemble a weight of the ``codes`` called ``packed``; its number ``part`` multiplies, or divides, block scales.

    The product of step and code is rounded to bfloat16. Raises ``CheckpointError`` naming what cannot be read.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if columns % 16:
        raise stored.unsupported(f"{module}.weight", f"{columns} columns", "a multiple of 16")
    stored.take(packed, ("u8",))
    scale = stored.take(f"{module}.weight_scale", (E4M3,), ((rows, columns // 16),))
    whole = stored.take(f"{module}.{part}", ("f32",), ((1,), ()))
    number = read_raw(whole).view(np.float32).reshape(-1)[0]
    if not 2.0**-126 <= number < np.inf:
        raise stored.unsupported(f"{module}.{part}", number, "a positive number of float32, not subnormal")
    there, back = (_multiplied, _divided) if multiplies else (_divided, _multiplied)
    steps = ScaleTensor(
        scale,
        unpack=lambda scales, count: there(scales.astype(np.float32), number),
        pack=lambda steps: back(steps, number).astype(ml_dtypes.float8_e4m3fn),
        beside=whole,
    )
    stored.add(
        f"{module}.weight",
        "nvfp4a16",
        (rows, columns),
        Float4Dequantizer(16),
        codes,
        steps,
        activations=activations,
    )


def _divided(numbers: F32, divisor: np.float32) -> F32:
    return numbers / divisor


def _multiplied(numbers: F32, factor: np.float32) -> F32:
    return numbers * factor


def _powers(exponents: Array, count: int) -> F32:
    return E8M0[exponents]


def _exponents(steps: F32) -> Array:
    return np.searchsorted(E8M0, steps).astype(np.uint8)
