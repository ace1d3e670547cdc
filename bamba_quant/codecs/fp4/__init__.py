"""FP4 weights (e2m1) with a scale for each block of a row, as compressed-tensors stores them: NVFP4 and MXFP4.

NVFP4's blocks of 16 have e4m3 scales under one float32 number of the matrix, by which a loader divides them; MXFP4's
blocks of 32 have powers of two. Either way a byte of the file stands for one of 256 steps, and a code is the nearest
e2m1 number to weight/step in float32, half to even: the code that compressed-tensors finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from bamba_quant.codecs.arithmetic import serial_sum
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.base import DTYPES, Encode, Method, Part, Parts, Shared
from bamba_quant.codecs.compressed_tensors import compressed_tensors
from bamba_quant.codecs.fp8 import compiled_largest, largest_bits, largest_of
from bamba_quant.codecs.integers.grid import pack
from bamba_quant.codecs.layout import half_powers
from bamba_quant.codecs.mxfp4 import VALUES as DOUBLED
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec

INPUT_SCALE = ".input_global_scale"
VALUES = DOUBLED / np.float32(2)  # of e2m1, by code
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
with np.errstate(over="ignore"):
    E8M0 = half_powers(np.arange(256, dtype=np.uint8)) * np.float32(2)  # the last one is infinite

_LARGEST = np.float32(6)
_SPACING = np.array([0.5, 1, 2], np.float32)  # of e2m1 numbers below 2, below 4, and up to 6
_MOST_GLOBAL = np.float32(2.0**117)  # no step lies below 2^-126, where processors and GPUs may read zero


def global_scale(amax: F32) -> F32:
    """(1,): 448·6/amax as torch divides a number by a tensor (compressed-tensors, ``generate_gparam``), 1 for zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / amax
        scale: F32 = np.where(
            amax > 0, np.minimum(np.float32(448 * 6) * inverse, _MOST_GLOBAL), np.float32(1)
        )
    return scale


def _e4m3_of_largest(amax: F32, shared: F32) -> U8:
    """The bytes of the e4m3 numbers nearest to amax/6 times the global scale; that of 2^-9 in place of 0."""
    nearest = np.minimum(amax / _LARGEST * shared, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    found: U8 = np.maximum(nearest.view(np.uint8), np.uint8(1))
    return found


def _e8m0_of_largest(amax: F32, shared: Shared) -> U8:
    """The exponents under which amax lies in [3.5, 7) steps (compressed-tensors, ``generate_mx_scales``)."""
    exponent = (amax.view(np.int32) + (1 << 21) >> 23) - 2
    return np.clip(exponent, MXFP4.low, MXFP4.high).astype(np.uint8)


@dataclass(frozen=True)
class Scheme:
    """``block`` columns share a step, which a byte of [``low``, ``high``] stands for, stored as ``dtype``.

    ``steps(shared)`` are those of all bytes, float32 (256,); ``of_largest(amax, shared)`` the bytes under which the
    largest magnitudes of blocks keep their size. A search tries ``offsets`` from these bytes, the first where several
    are as good, and with importance the ``saturating`` ones, which give up large weights that matter little.
    """

    block: int
    dtype: str
    low: int
    high: int
    steps: Callable[[Shared], F32]
    of_largest: Callable[[F32, Shared], U8]
    offsets: tuple[int, ...]
    saturating: tuple[int, ...] = ()


# From one eighth above the largest code to below 4, so that both 4 and 6 are among what a largest weight becomes.
NVFP4 = Scheme(
    16,
    "F8_E4M3",
    1,
    126,
    lambda shared: E4M3 / shared,
    _e4m3_of_largest,
    (0, -2, -1, 1, 2, 3, 4, 5, 6),
    (-6, -5, -4, -3),
)
# Under the largest exponent all e2m1 numbers are finite in bfloat16.
MXFP4 = Scheme(32, "U8", 1, 252, lambda shared: E8M0, _e8m0_of_largest, (0, -1, 1))


def nearest(magnitude: F32) -> tuple[U8, F32]:
    """The code of the nearest e2m1 number, half to even, and that number, of magnitudes in steps."""
    capped = np.minimum(magnitude, _LARGEST)
    octave = (capped >= 2).astype(np.uint8) + (capped >= 4)
    spacing = _SPACING[octave]
    whole = np.rint(capped / spacing)
    return whole.astype(np.uint8) + 2 * octave, whole * spacing


def encode(
    x: F32, importance: F32 | None, steps: F32, base: U8, scheme: Scheme, offsets: tuple[int, ...]
) -> tuple[U8, U8]:
    """Codes in pairs (rows, columns/2), the first in the low nibble, and scale bytes (rows, columns/block).

    ``base`` are the bytes that ``offsets`` start from. Squared errors are counted in steps of ``base``, so that no
    power of two changes a choice, and summed in the order of columns.
    """
    blocks = np.moveaxis(x.reshape(*base.shape, scheme.block), -1, 0)  # (block, rows, blocks)
    weights = None if importance is None else importance.reshape(1, -1, scheme.block).T.swapaxes(1, 2)
    best = np.full(base.shape, np.inf, np.float32)
    chosen = base.copy()
    for offset in offsets if len(offsets) > 1 else ():
        tried = np.clip(base.astype(np.int64) + offset, scheme.low, scheme.high)
        magnitude = np.divide(np.abs(blocks), steps[tried], dtype=np.float32)
        squared = np.square(magnitude - nearest(magnitude)[1])
        ratio = steps[tried] / steps[base]
        error = serial_sum(squared if weights is None else squared * weights) * (ratio * ratio)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, tried, chosen).astype(np.uint8)
    sizes = np.divide(np.abs(x), np.repeat(steps[chosen], scheme.block, axis=1), dtype=np.float32)
    codes = nearest(sizes)[0]
    return pack((codes | np.signbit(x).astype(np.uint8) << 3).view(np.int8), 4, 0), chosen


def _encode(
    x: F32, importance: F32 | None, shared: Shared, *, scheme: Scheme, offsets: tuple[int, ...], run: Any
) -> Parts:
    amax = np.abs(x).reshape(len(x), -1, scheme.block).max(axis=2)
    if len(offsets) > 1 and importance is not None:
        offsets += scheme.saturating
    with np.errstate(all="ignore"):
        packed, chosen = run(
            x, importance, scheme.steps(shared), scheme.of_largest(amax, shared), scheme, offsets
        )
    return {".weight_packed": packed, ".weight_scale": chosen.view(DTYPES[scheme.dtype])}


def _compiled(scheme: Scheme, offsets: tuple[int, ...]) -> Encode:
    from bamba_quant.codecs.fp4.compiled import encode

    return partial(_encode, scheme=scheme, offsets=offsets, run=encode)


def _methods(scheme: Scheme, shares: bool) -> tuple[Method, ...]:
    """A search and absmax; with ``shares`` matrices are measured before."""
    known = {
        "search": ("scales of least squared error, near those of absmax", scheme.offsets),
        "absmax": (
            "a block's largest magnitude decides its scale, as compressed-tensors' observer has it",
            (0,),
        ),
    }
    measuring: dict[str, Any] = {}
    if shares:
        measuring = {
            "measure": largest_bits, "compiled_measure": compiled_largest, "combine": np.maximum,
            "share": lambda found: global_scale(largest_of(found)),
        }  # fmt: skip
    return tuple(
        Method(name, about, partial(_encode, scheme=scheme, offsets=offsets, run=encode),
               partial(_compiled, scheme, offsets), weighs=name != "absmax", **measuring)
        for name, (about, offsets) in known.items()
    )  # fmt: skip


def _codec(
    name: str, about: str, scheme: Scheme, strategy: str, scale_dtype: str, shares: bool,
    activations: dict[str, Any] | None = None,
) -> SafetensorsCodec:  # fmt: skip
    """A form of FP4 weights; ``activations`` say what differs from weights in a configuration."""
    form = f"{name[:5]}-pack-quantized"
    measured = activations is not None and shares

    def tensors(rows: int, columns: int) -> tuple[Part, ...]:
        parts = (
            Part(".weight_packed", "U8", (rows, columns // 2)),
            Part(".weight_scale", scheme.dtype, (rows, columns // scheme.block)),
        )
        whole = (".weight_global_scale",) * shares + (INPUT_SCALE,) * measured
        return (*parts, *(Part(suffix, "F32", (1,), 0) for suffix in whole))

    def configuration(ignored: Ignored) -> dict[str, Any]:
        types = {"scale_dtype": scale_dtype, "zp_dtype": scale_dtype}
        both = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": scheme.block} | types
        return compressed_tensors(
            ignored, both, activations if activations is None else both | activations, form
        )

    return SafetensorsCodec(
        name=name,
        about=about,
        tensors=tensors,
        methods=_methods(scheme, shares),
        configuration=configuration,
        packed=True,
        measured=INPUT_SCALE if measured else "",
        fits=lambda rows, columns: (
            "" if columns % scheme.block == 0 else f"columns in multiples of {scheme.block}"
        ),
        whole=lambda rows, columns, shared: {".weight_global_scale": shared} if shares else {},
    )


_OF_NVFP4 = (NVFP4, "tensor_group", "torch.float8_e4m3fn", True)
_OF_MXFP4 = (MXFP4, "group", "torch.uint8", False)
CODECS = (
    _codec("nvfp4a16", "e2m1, an e4m3 scale for 16 columns, a float32 scale for matrices that run fused", *_OF_NVFP4),
    _codec("mxfp4a16", "e2m1, a power of two for 32 columns", *_OF_MXFP4),
    _codec("nvfp4a4", "nvfp4a16 with activations in the same form, under a float32 scale from a text", *_OF_NVFP4,
           activations={"dynamic": "local", "observer": "static_minmax"}),
    _codec("mxfp4a4", "mxfp4a16 with activations in the same form", *_OF_MXFP4, activations={}),
)  # fmt: skip
