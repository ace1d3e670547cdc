"""compressed-tensors' "pack-quantized" layout: integers of 4 or 8 bits in int32 words, a bfloat16 scale a group.

Words are little-endian and hold each integer plus 2^(bits-1), the first in the lowest bits; integer zero points are
packed the same way along the rows (compressed_tensors/compressors/pack_quantized/helpers.py, 0.20). Every scale is a
bfloat16 number before the first integer is chosen, so a loader multiplies by what the search saw.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bamba_quant.codecs.arrays import F32, Array
from bamba_quant.codecs.base import Part, Parts
from bamba_quant.codecs.compressed_tensors import compressed_tensors
from bamba_quant.codecs.integers.grid import IntegerGrid
from bamba_quant.codecs.integers.methods import GROUPS, as_bfloat16, integer_methods
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec

_WORD = np.dtype("<i4")


def packed_integers(bits: int, symmetric: bool, group: int) -> SafetensorsCodec:
    """The scheme of this many bits, with integer zero points unless ``symmetric``, a scale for ``group`` columns."""
    grid = IntegerGrid(bits, "none" if symmetric else "integer", group)
    per_word = 32 // bits

    def parts(rows: int, columns: int) -> tuple[Part, ...]:
        groups = columns // group
        always = (
            Part(".weight_packed", "I32", (rows, columns // per_word)),
            Part(".weight_scale", "BF16", (rows, groups)),
            Part(".weight_shape", "I64", (2,), 0),
        )
        if symmetric:
            return always
        return (*always, Part(".weight_zero_point", "I32", (-(-rows // per_word), groups), per_word))

    return SafetensorsCodec(
        name=scheme_name(bits, symmetric, group),
        about=f"int{bits}, {'symmetric' if symmetric else 'with zero points'}, a scale for {group} columns",
        tensors=parts,
        methods=integer_methods(grid, 1 << bits - 1, partial(_parts, grid)),
        configuration=partial(_configuration, bits=bits, symmetric=symmetric, group=group),
        packed=True,
        zero_points=not symmetric,
        row_multiple=1 if symmetric else per_word,
        fits=lambda rows, columns: "" if columns % group == 0 else f"columns in multiples of {group}",
        whole=lambda rows, columns, shared: {".weight_shape": np.array([rows, columns], np.int64)},
    )


def scheme_name(bits: int, symmetric: bool, group: int) -> str:
    """As compressed-tensors names its presets, with the group: w4a16-g128, w4a16-asym-g128."""
    return f"w{bits}a16{'' if symmetric else '-asym'}-g{group}"


def _parts(grid: IntegerGrid, packed: Array, scale: F32, zero: F32) -> Parts:
    parts = {".weight_packed": np.ascontiguousarray(packed).view(_WORD), ".weight_scale": as_bfloat16(scale)}
    if grid.zero == "integer":
        parts[".weight_zero_point"] = pack_zeros(zero.astype(np.int8), grid.bits)
    return parts


def pack_zeros(zero: Array, bits: int) -> Array:
    """int8 (rows, groups) to int32 (rows·bits/32, groups), words along the rows; rows that are missing are 0 bits."""
    per_word = 32 // bits
    rows, groups = zero.shape
    unsigned = np.zeros((-(-rows // per_word) * per_word, groups), np.uint32)
    unsigned[:rows] = zero.astype(np.int32) + (1 << bits - 1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    words: Array = np.bitwise_or.reduce(unsigned.reshape(-1, per_word, groups) << shifts, axis=1)
    packed: Array = words.view(_WORD)
    return packed


def unpack_zeros(words: Array, bits: int, rows: int) -> F32:
    """The inverse of ``pack_zeros`` for the first ``rows`` rows, as float32."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    unsigned = (words.view(np.uint32)[:, None] >> shifts) & np.uint32((1 << bits) - 1)
    zero: F32 = unsigned.reshape(-1, words.shape[1])[:rows].astype(np.float32) - np.float32(1 << bits - 1)
    return zero


def _configuration(ignored: Ignored, bits: int, symmetric: bool, group: int) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": symmetric,
        "zp_dtype": None if symmetric else "torch.int8",
    }
    return compressed_tensors(ignored, weights, None, "pack-quantized")


CODECS = tuple(
    packed_integers(bits, symmetric, group)
    for bits in (4, 8)
    for symmetric in (True, False)
    for group in GROUPS
)
