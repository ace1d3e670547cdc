"""transformers' own FP8 form (``quant_method`` "fp8"): e4m3 weights, a float32 ``weight_scale_inv`` for each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler, are_two_lengths
from bamba_quant.checkpoint.dequantize import Float8Dequantizer
from bamba_quant.checkpoint.packed import Activations, ScaleTensor
from bamba_quant.errors import repr_short


def read_hf_fp8(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Assemble every e4m3 matrix and its scales. Raises ``CheckpointError`` naming what cannot be read."""
    block = quantization.get("weight_block_size")
    if not are_two_lengths(block):
        found = f"weight_block_size {repr_short(block)}"
        raise stored.unsupported("quantization_config", found, "two whole numbers", "the checkpoint")
    height, width = block
    for name, codes in list(stored.remaining().items()):
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
    stored.unused |= {
        name for name in stored.remaining() if name.endswith((".activation_scale", ".input_scale"))
    }
    for name in stored.remaining():
        if name.endswith("_scale_inv"):
            raise stored.unsupported(name, "scales of no e4m3 matrix", "e4m3", "a weight with such a part")


def _activations_hf_fp8(quantization: Mapping[str, Any], width: int) -> Activations:
    """The rounding of activations: in groups as wide as the weights' blocks (finegrained_fp8.py)."""
    scheme = quantization.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        return Activations(unknown=f"activation_scheme {repr_short(scheme)}")
    return Activations("group", width)
