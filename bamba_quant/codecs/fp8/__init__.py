"""FP8 weights (e4m3) with scales of rows, of blocks or of a matrix, as compressed-tensors and transformers read them.

Scales are bfloat16 numbers whatever type they are stored in, for loaders cast them to it; weights are divided by the
stored scale in float32 and rounded once, to nearest even. So a code is the nearest one to its weight under the scale
that a loader has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32, Array
from bamba_quant.codecs.base import DTYPES, Method, Part, Parts
from bamba_quant.codecs.compressed_tensors import compressed_tensors
from bamba_quant.codecs.fp8.scales import BINS, LARGEST, energies, histograms, of_largest, positions, searched
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128

_ABSMAX = "the largest magnitude becomes 448"
_SEARCH = "least squared error of the weights over all bfloat16 mantissas"
_WEIGHT_OF_IMPORTANCE = 1 << 16  # whole numbers of columns' weights, so that sums are exact in any order

Tile = tuple[int, int]  # rows and columns that share a scale; 0 columns mean all


def codes(x: F32, scales: F32) -> Array:
    """Nearest e4m3 of x/scales, beyond ±448 that; ``scales`` broadcasts against ``x``."""
    with np.errstate(over="ignore"):
        return np.clip(x / scales, -LARGEST, LARGEST).astype(E4M3)


def spread(scales: F32, tile: Tile, rows: int, columns: int) -> F32:
    """The scale of every element, or of every row where a tile spans it."""
    tall = np.repeat(scales, tile[0], axis=0)[:rows]
    return tall if tile[1] == 0 else np.repeat(tall, tile[1], axis=1)[:, :columns]


def tile_scales(x: F32, importance: F32 | None, tile: Tile, search: bool) -> F32:
    """(ceil(rows/height), ceil(columns/width)) scales of the tiles of ``x``, those at the edges cut short."""
    rows, columns = x.shape
    height, width = tile[0], tile[1] or columns
    found = np.empty((-(-rows // height), -(-columns // width)), np.float32)
    for i, top in enumerate(range(0, rows, height)):
        for j, left in enumerate(range(0, columns, width)):
            group = x[top : top + height, left : left + width]
            amax = np.abs(group).max(initial=0).reshape(1)
            if search:
                weights = None if importance is None else importance[left : left + width]
                weighted = None if weights is None else np.tile(weights, len(group))
                found[i, j] = searched(histograms(group.reshape(1, -1), weighted), amax)[0]
            else:
                found[i, j] = of_largest(amax)[0]
    return found


def _encode_tiles(
    x: F32, importance: F32 | None, shared: Any, *, tile: Tile, search: bool, scale: Part
) -> Parts:
    scales = tile_scales(x, importance, tile, search)
    return {
        ".weight": codes(x, spread(scales, tile, *x.shape)),
        scale.suffix: scales.astype(DTYPES[scale.dtype]),
    }


def _compiled_tiles(tile: Tile, search: bool, scale: Part) -> Callable[[F32, F32 | None, Any], Parts]:
    from bamba_quant.codecs.fp8 import compiled as fp8

    def encode(x: F32, importance: F32 | None, shared: Any) -> Parts:
        packed, scales = fp8.encode_tiles(x, importance, tile, search)
        return {".weight": packed.view(E4M3), scale.suffix: scales.astype(DTYPES[scale.dtype])}

    return encode


def _tiled(name: str, about: str, tile: Tile, scale: Part, configuration: Callable[[Ignored], dict[str, Any]],
           fits: Callable[[int, int], str] = lambda rows, columns: "") -> SafetensorsCodec:  # fmt: skip
    """A scheme of one scale a tile; ``scale`` says how they are stored, its shape aside."""
    height, width = tile

    def parts(rows: int, columns: int) -> tuple[Part, ...]:
        shape = (-(-rows // height), -(-columns // (width or columns)))
        return Part(".weight", "F8_E4M3", (rows, columns)), Part(scale.suffix, scale.dtype, shape, height)

    methods = tuple(
        Method(method, about, partial(_encode_tiles, tile=tile, search=search, scale=scale),
               compiled=partial(_compiled_tiles, tile, search, scale), weighs=search)
        for method, about, search in (("search", _SEARCH, True), ("absmax", _ABSMAX, False))
    )  # fmt: skip
    blocks = height if height > 1 else 0
    return SafetensorsCodec(
        name=name, about=about, tensors=parts, methods=methods, configuration=configuration,
        row_multiple=height, block_rows=blocks, fits=fits,
    )  # fmt: skip


def _encode_shared(x: F32, importance: F32 | None, shared: F32) -> Parts:
    return {".weight": codes(x, shared)}


def _compiled_shared() -> Callable[[F32, F32 | None, Any], Parts]:
    from bamba_quant.codecs.fp8 import compiled as fp8

    return lambda x, importance, shared: {".weight": fp8.encode_scaled(x, shared).view(E4M3)}


def largest_bits(x: F32, importance: F32 | None = None) -> NDArray[np.int64]:
    """(1,): the largest magnitude's bits, which order as magnitudes do."""
    found: NDArray[np.int64] = np.abs(x).view(np.uint32).max(initial=0).astype(np.int64).reshape(1)
    return found


def counts(x: F32, importance: F32 | None = None) -> NDArray[np.int64]:
    """(65537,): how often each position occurs, times its columns' whole weights; then the largest's bits."""
    weights = whole_weights(importance)
    found = np.zeros(256 * BINS + 1, np.int64)
    where = positions(x)
    np.add.at(found, where, 1 if weights is None else np.broadcast_to(weights, x.shape))
    found[-1:] = largest_bits(x)
    return found


def whole_weights(importance: F32 | None) -> NDArray[np.int64] | None:
    """Importance as whole numbers, the largest 65536; a column counts at least 1."""
    if importance is None or not importance.max() > 0:
        return None
    scaled = np.rint(importance.astype(np.float64) / importance.max() * _WEIGHT_OF_IMPORTANCE)
    whole: NDArray[np.int64] = np.maximum(scaled, 1).astype(np.int64)
    return whole


def _compiled_counts() -> Callable[[F32, F32 | None], Array]:
    from bamba_quant.codecs.fp8 import compiled as fp8

    return lambda x, importance: fp8.counts(x, whole_weights(importance))


def compiled_largest() -> Callable[[F32, F32 | None], Array]:
    """The compiled version of ``largest_bits``."""
    from bamba_quant.codecs.fp8 import compiled as fp8

    return lambda x, importance: fp8.largest_bits(x)


def _joined(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts add up, the last entry is the larger."""
    joined = a + b
    joined[-1] = max(a[-1], b[-1])
    return joined


def largest_of(bits: NDArray[np.int64]) -> F32:
    """(1,): the magnitude of the bits that ``largest_bits`` found, the last of several numbers."""
    return bits[-1:].astype(np.uint32).view(np.float32)


def _scale_of_counts(found: NDArray[np.int64]) -> F32:
    histogram = (found[:-1] * energies()).reshape(-1, BINS).sum(axis=0)
    return searched(histogram[None], largest_of(found))


def _scale_of_largest(found: NDArray[np.int64]) -> F32:
    return of_largest(largest_of(found))


def _tensor_parts(rows: int, columns: int) -> tuple[Part, ...]:
    return Part(".weight", "F8_E4M3", (rows, columns)), Part(".weight_scale", "BF16", (1,), 0)


def _tensor_whole(rows: int, columns: int, shared: F32) -> Parts:
    return {".weight_scale": shared.astype(ml_dtypes.bfloat16)}


def _float_quantized(
    ignored: Ignored, weights: dict[str, Any], activations: dict[str, Any]
) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float"}
    return compressed_tensors(ignored, eight | weights, eight | activations, "float-quantized")


def _fine_grained(ignored: Ignored) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [*ignored.modules, *ignored.aliases],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def _whole_groups(rows: int, columns: int) -> str:
    """Activations are quantized by groups of neighbours, and compressed-tensors pads none of them."""
    return "" if columns % BLOCK == 0 else f"columns in a multiple of {BLOCK}"


def _whole_blocks(rows: int, columns: int) -> str:
    """transformers takes a block's height to be rows over rows of scales (finegrained_fp8.py, ``_dequantize_one``)."""
    return "" if rows % BLOCK == 0 == columns % BLOCK else f"rows and columns in multiples of {BLOCK}"


CODECS = (
    _tiled(
        "fp8-dynamic",
        "e4m3, a scale for each row, activations by token",
        (1, 0),
        Part(".weight_scale", "BF16", ()),
        partial(
            _float_quantized,
            weights={"strategy": "channel"},
            activations={"strategy": "token"},
        ),
    ),
    SafetensorsCodec(
        name="fp8-tensor",
        about="e4m3, one scale for matrices that run fused, activations by tensor",
        tensors=_tensor_parts,
        methods=(
            Method(
                "search",
                _SEARCH,
                _encode_shared,
                _compiled_shared,
                counts,
                _compiled_counts,
                _joined,
                _scale_of_counts,
            ),
            Method(
                "absmax",
                _ABSMAX,
                _encode_shared,
                _compiled_shared,
                largest_bits,
                compiled_largest,
                np.maximum,
                _scale_of_largest,
                weighs=False,
            ),
        ),
        configuration=partial(
            _float_quantized, weights={"strategy": "tensor"}, activations={"strategy": "tensor"}
        ),
        whole=_tensor_whole,
    ),
    _tiled(
        "fp8-block",
        "e4m3, a scale for each block of 128 × 128, activations by 128",
        (BLOCK, BLOCK),
        Part(".weight_scale", "BF16", ()),
        partial(
            _float_quantized,
            weights={"strategy": "block", "block_structure": [BLOCK, BLOCK]},
            activations={"strategy": "group", "group_size": BLOCK},
        ),
        _whole_groups,
    ),
    _tiled(
        "fp8-block-inv",
        "e4m3, a scale for each block of 128 × 128, in transformers' own form",
        (BLOCK, BLOCK),
        Part(".weight_scale_inv", "F32", ()),
        _fine_grained,
        _whole_blocks,
    ),
)
