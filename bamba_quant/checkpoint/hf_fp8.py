"""transformers' own FP8 form (``quant_method`` "fp8"): e4m3 weights, a float32 ``weight_scale_inv`` for each block."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler
from bamba_quant.checkpoint.dequantize import Float8Dequantizer
from bamba_quant.checkpoint.packed import Activations, ScaleTensor
from bamba_reference.errors import repr_short


def read_hf_fp8(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Join every e4m3 matrix with its scales. Raises ``CheckpointError`` naming what cannot be read."""
    block = quantization.get("weight_block_size")
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)
    ):
        raise stored.unsupported(
            "the checkpoint",
            "quantization_config",
            f"weight_block_size {repr_short(block)}",
            "two whole numbers",
        )
    height, width = block
    for name, codes in list(stored.left().items()):
        if codes.format.name == E4M3 and name.endswith(".weight") and len(codes.shape) == 2:
            rows, columns = codes.shape
            scale = stored.take(f"{name}_scale_inv", shapes=((-(-rows // height), -(-columns // width)),))
            stored.take(name, (E4M3,))
            stored.add(
                name,
                "e4m3 by block",
                (rows, columns),
                Float8Dequantizer(columns, width, scale.format.name),
                codes,
                ScaleTensor(scale, height),
                activations=_activations_hf_fp8(quantization, width),
            )
    stored.unused |= {name for name in stored.left() if name.endswith((".activation_scale", ".input_scale"))}
    for name in stored.left():
        if name.endswith("_scale_inv"):
            raise stored.unsupported("a weight with such a part", name, "scales of no e4m3 matrix", "e4m3")


def _activations_hf_fp8(quantization: Mapping[str, Any], width: int) -> Activations:
    """What transformers' own FP8 form says: groups as wide as the weights' blocks (finegrained_fp8.py)."""
    scheme = quantization.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        return Activations(unknown=f"activation_scheme {reprlib.repr(scheme)}")
    return Activations("group", width)
