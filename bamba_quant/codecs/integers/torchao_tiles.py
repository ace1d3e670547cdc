"""torchao's ``Int4TilePackedTo4dTensor``: the integers in the order in which CUDA's tinygemm kernel loads them.

The kernel's own packing (``aten::_convert_weight_to_int4pack`` with eight inner tiles, ATen's int4mm.cu) runs on CUDA
alone; it is a permutation, and this one gives its words anywhere. Columns are padded to a multiple of 1024 with
weights that are 0, as torchao pads them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bamba_quant.codecs.arrays import F32, U8, Array
from bamba_quant.codecs.base import Part, Parts
from bamba_quant.codecs.integers.grid import IntegerGrid, unpack
from bamba_quant.codecs.integers.methods import GROUPS, as_bfloat16, integer_methods
from bamba_quant.codecs.integers.search import EPSILON
from bamba_quant.codecs.integers.torchao_plain import WHOLE_RANGE, configuration, metadata, scheme_name
from bamba_quant.codecs.safetensors import SafetensorsCodec

if TYPE_CHECKING:
    import torch

COLUMNS = 1024  # a row is padded to a multiple of them
TILE = 8  # rows of a tile
_QDATA, _PARAMETERS = "._weight_qdata", "._weight_scale_and_zero"
# Columns of 128 by (outer tile, word, pair of the word, lane of the quad, half of the pair); a word's pairs lie in
# its two halves.
_SHIFTS = (4 * np.arange(4)[:, None] + 16 * np.arange(2)).astype(np.uint32)


def pack_tiles(codes: Array) -> Array:
    """Integers of [-8, 7], int8 (rows, columns), to int32 (rows/8, columns/128, 32, 4)."""
    rows, columns = codes.shape
    unsigned = (codes.view(np.uint8) + np.uint8(8)).astype(np.uint32)
    pairs = unsigned.reshape(
        rows // TILE, TILE, columns // 128, 4, 4, 4, 2
    )  # tile, row, outer, word, pair, lane, half
    words = np.bitwise_or.reduce(pairs << _SHIFTS[:, None, :], axis=(4, 6))  # tile, row, outer, word, lane
    ordered = np.ascontiguousarray(words.transpose(0, 2, 1, 4, 3))
    packed: Array = ordered.reshape(rows // TILE, columns // 128, 4 * TILE, 4).view(np.int32)
    return packed


def unpack_tiles(words: Array) -> Array:
    """The inverse of ``pack_tiles``."""
    tiles, outer = words.shape[:2]
    ordered = words.view(np.uint32).reshape(tiles, outer, TILE, 4, 4).transpose(0, 2, 1, 4, 3)
    pairs = ordered[:, :, :, :, None, :, None] >> _SHIFTS[:, None, :] & np.uint32(15)
    codes: Array = (pairs.reshape(tiles * TILE, outer * 128).astype(np.uint8) - np.uint8(8)).view(np.int8)
    return codes


def unpack_tiles_on(words: torch.Tensor) -> torch.Tensor:
    """``unpack_tiles`` of a tensor, where it lies."""
    import torch

    tiles, outer = words.shape[:2]
    shifts = torch.from_numpy(_SHIFTS.astype(np.int32)).to(words.device)
    ordered = words.view(tiles, outer, TILE, 4, 4).permute(0, 2, 1, 4, 3)
    pairs = (ordered[:, :, :, :, None, :, None] >> shifts[:, None, :]) & 15
    return (pairs.reshape(tiles * TILE, outer * 128) - 8).to(torch.int8)


def padded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def tile_packed_int4(group: int) -> SafetensorsCodec:
    """The scheme whose scales and zeros cover ``group`` columns each."""
    grid = IntegerGrid(4, "float", group)

    def parts(rows: int, columns: int) -> tuple[Part, ...]:
        wide = padded(columns)
        return (
            Part(_QDATA, "I32", (-(-rows // TILE), wide // 128, 4 * TILE, 4), TILE),
            Part(_PARAMETERS, "BF16", (wide // group, rows, 2), 1, 1),
        )

    def fits(rows: int, columns: int) -> str:
        divides = columns % group == 0 and rows % TILE == 0
        return "" if divides else f"rows in multiples of {TILE} and columns in multiples of {group}"

    return SafetensorsCodec(
        name=scheme_name(group, tile_packed=True),
        about=f"torchao's int4 in tinygemm's tiles, a scale and a float zero for {group} columns",
        tensors=parts,
        methods=integer_methods(grid, 0, partial(_parts, grid), WHOLE_RANGE),
        configuration=partial(configuration, group=group, packing="TILE_PACKED_TO_4D"),
        kernels="a CUDA GPU, for tinygemm",
        row_multiple=TILE,
        fits=fits,
        experts=False,
        metadata=partial(metadata, describe=partial(_describe, group=group)),
    )


def _parts(grid: IntegerGrid, packed: U8, scale: F32, zero: F32) -> Parts:
    codes = unpack(packed, 4, 0)
    rows, columns = codes.shape
    wide = padded(columns)
    filled = np.zeros((rows, wide), np.int8)
    filled[:, :columns] = codes
    both = np.zeros((wide // grid.group, rows, 2), np.float32)
    both[..., 0] = EPSILON
    both[: columns // grid.group, :, 0] = scale.T
    both[: columns // grid.group, :, 1] = zero.T
    return {_QDATA: pack_tiles(filled), _PARAMETERS: as_bfloat16(both)}


def _describe(shape: tuple[int, int], group: int) -> dict[str, Any]:
    data = {"block_size": [1, group], "shape": list(shape)}
    return {
        "_type": "Int4TilePackedTo4dTensor",
        "_data": data,
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }


CODECS = tuple(tile_packed_int4(group) for group in GROUPS)
