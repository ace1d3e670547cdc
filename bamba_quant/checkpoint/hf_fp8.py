"""FP8 of ``quant_method`` "fp8": transformers' own form, a ``weight_scale_inv`` for each block, or one number a matrix.

AutoFP8 calls that number ``weight_scale``, transformers ``weight_scale_inv``; weights are multiplied by either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler, are_two_lengths
from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.checkpoint.dequantize import Float8Dequantizer
from bamba_quant.checkpoint.packed import Activations, ScaleTensor
from bamba_quant.errors import repr_short


def read_hf_fp8(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Assemble every e4m3 matrix and its scales. Raises ``CheckpointError`` naming what cannot be read."""
    block = quantization.get("weight_block_size")
    if block is None:
        activations = quantization.get("activation_scheme", "dynamic")
        if activations not in ("dynamic", "static"):
            found = f"activation_scheme {repr_short(activations)}"
            raise stored.unsupported("quantization_config", found, "dynamic or static", "the checkpoint")
        for name, codes in list(stored.remaining().items()):
            if codes.format.name == E4M3 and name.endswith(".weight") and len(codes.shape) == 2:
                parts = ("weight_scale", "weight_scale_inv")
                assemble_by_tensor(
                    stored, name.removesuffix(".weight"), codes, parts, static=activations == "static"
                )
        _check_rest(stored)
        return
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
    _check_rest(stored)


def assemble_by_tensor(
    stored: WeightAssembler, module: str, codes: StoredTensor, parts: Sequence[str], *, static: bool
) -> None:
    """Assemble an e4m3 weight with one scale, the first of ``parts`` there is; so have ``static`` activations."""
    part = next((part for part in parts if stored.get(f"{module}.{part}") is not None), parts[0])
    scale = stored.take(f"{module}.{part}", shapes=((1,), (), (1, 1)))
    stored.take(f"{module}.weight", (E4M3,))
    rows, columns = codes.shape
    rounding = Activations("tensor")
    if static:
        number = stored.number(f"{module}.input_scale") or stored.number(f"{module}.activation_scale")
        rounding = Activations("tensor", scale=number) if number else Activations(unknown="no input_scale")
    stored.add(
        f"{module}.weight", "e4m3 by tensor", (rows, columns), Float8Dequantizer(columns, columns, scale.format.name),
        codes, ScaleTensor(scale, 0), activations=rounding,
    )  # fmt: skip


def _check_rest(stored: WeightAssembler) -> None:
    stored.unused |= {
        name for name in stored.remaining() if name.endswith((".activation_scale", ".input_scale"))
    }
    for name in stored.remaining():
        if name.endswith(("_scale_inv", ".weight_scale")):
            raise stored.unsupported(name, "scales of no e4m3 matrix", "e4m3", "a weight with such a part")


def _activations_hf_fp8(quantization: Mapping[str, Any], width: int) -> Activations:
    """The rounding of activations: in groups as wide as the weights' blocks (finegrained_fp8.py)."""
    scheme = quantization.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        return Activations(unknown=f"activation_scheme {repr_short(scheme)}")
    return Activations("group", width)
