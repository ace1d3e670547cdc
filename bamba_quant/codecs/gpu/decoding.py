"""Every format, read on the device: raw blocks in, weights out, numpy's values to the bit.

A thread computes one weight from its block's bytes, so a format is one function of where the block begins and
which of its weights is wanted. What is rounded is rounded once, from float32 to the dtype asked for.
"""
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.codecs.codebooks import gpu as codebooks
from bamba_quant.codecs.gpu.bits import bit, byte, crumb, field, half, nibble, signed
from bamba_quant.codecs.iq4 import VALUES as IQ4
from bamba_quant.codecs.mxfp4 import VALUES as MXFP4
from bamba_quant.errors import FormatError
from bamba_reference.runtime.triton_cache import name_errors

name_errors()

_LANES = 1024


@triton.jit
def _q8_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return signed(byte(at + 2 + j)) * half(at)


@triton.jit
def _q4_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return (nibble(at + 2, j, 32) - 8).to(tl.float32) * half(at)


@triton.jit
def _q4_1(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return nibble(at + 4, j, 32).to(tl.float32) * half(at) + half(at + 2)


@triton.jit
def _q5_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    L = nibble(at + 6, j, 32) | (field(at + 2, j, 1) << 4)
    return (L - 16).to(tl.float32) * half(at)


@triton.jit
def _q5_1(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    L = nibble(at + 8, j, 32) | (field(at + 4, j, 1) << 4)
    return L.to(tl.float32) * half(at) + half(at + 2)


@triton.jit
def _q2_k(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    code = byte(at + j // 16)
    step = half(at + 80) * (code & 15).to(tl.float32)
    low = half(at + 82) * (code >> 4).to(tl.float32)
    return step * crumb(at + 16, j).to(tl.float32) - low


@triton.jit
def _q3_k(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    g = j // 16
    low = (byte(at + 96 + g % 8) >> (g // 8 * 4)) & 15
    high = (byte(at + 104 + g % 4) >> (g // 4 * 2)) & 3
    step = half(at + 108) * ((low | (high << 4)) - 32).to(tl.float32)
    return step * ((crumb(at + 32, j) | (bit(at, j) << 2)) - 4).to(tl.float32)


@triton.jit
def _offset_k(at: tl.tensor, g: tl.tensor, L: tl.tensor) -> tl.tensor:
    """Q4_K's and Q5_K's weight of integer L in group g (``layout.unpack_scales_and_minima``)."""
    k, first = g % 4, g < 4
    scale, minimum, rest = byte(at + 4 + k), byte(at + 8 + k), byte(at + 12 + k)
    s = tl.where(first, scale & 63, (rest & 15) | (scale >> 6 << 4))
    m = tl.where(first, minimum & 63, (rest >> 4) | (minimum >> 6 << 4))
    return half(at) * s.to(tl.float32) * L.to(tl.float32) - half(at + 2) * m.to(tl.float32)


@triton.jit
def _q4_k(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return _offset_k(at, j // 32, nibble(at + 16, j, 64))


@triton.jit
def _q5_k(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return _offset_k(at, j // 32, nibble(at + 48, j, 64) | (bit(at + 16, j) << 4))


@triton.jit
def _q6_k(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    q = nibble(at, j, 128) | (crumb(at + 128, j) << 4)
    return half(at + 208) * signed(byte(at + 192 + j // 16)) * (q - 32).to(tl.float32)


@triton.jit
def _iq4_nl(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return half(at) * tl.load(table + nibble(at + 2, j, 32))


@triton.jit
def _iq4_xs(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    g = j // 32
    high = (byte(at + 2 + g // 4) >> (g % 4 * 2)) & 3
    low = (byte(at + 4 + g // 2) >> (g % 2 * 4)) & 15
    step = half(at) * ((low | (high << 4)) - 32).to(tl.float32)
    return step * tl.load(table + nibble(at + 8, j, 32))


@triton.jit
def _mxfp4(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    e = byte(at)
    power = tl.where(e < 2, (e + 1) * 0x00200000, (e - 1) << 23).to(tl.float32, bitcast=True)
    return tl.load(table + nibble(at + 1, j, 32)) * power


@triton.jit
def _tq1_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    second, third = j - 160, j - 240
    place = tl.where(j < 160, j % 32, tl.where(j < 240, 32 + second % 16, 48 + third % 4))
    n = tl.where(j < 160, j // 32, tl.where(j < 240, second // 16, third // 4))
    power = tl.where(n == 0, 1, tl.where(n == 1, 3, tl.where(n == 2, 9, tl.where(n == 3, 27, 81))))
    trit = (((byte(at + place) * power) & 255) * 3) >> 8
    return (trit - 1).to(tl.float32) * half(at + 52)


@triton.jit
def _tq2_0(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    return (crumb(at, j) - 1).to(tl.float32) * half(at + 64)


@triton.jit
def _decode(
    raw: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    WEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    # Lanes past the end read the last weight again.
    place = tl.minimum(index, n - 1)
    value = WEIGHT(raw + place // SIZE * BYTES, (place % SIZE).to(tl.int32), table)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=index < n)


_WEIGHTS: dict[str, Any] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    **codebooks.WEIGHTS,
}
_TABLES = {"iq4_nl": IQ4, "iq4_xs": IQ4, "mxfp4": MXFP4}


@cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    """What a format looks up, where it does."""
    values = codebooks.table(name) if name in codebooks.WEIGHTS else _TABLES.get(name, IQ4)
    return torch.from_numpy(values).to(device)


def decode(codec: BlockCodec, raw: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``Format.dequantize`` where raw lies: uint8 (rows, row_bytes) to (rows, n) of a float dtype.

    Raises ``FormatError`` for a format that the device cannot read.
    """
    raw = raw.contiguous()
    if codec.dtype is not None:
        return raw.view(getattr(torch, codec.dtype.name)).to(dtype)
    if codec.name not in _WEIGHTS:
        raise FormatError(
            f"{codec.name} cannot be read on a GPU",
            expected="one of " + ", ".join(_WEIGHTS),
            fix="read it on the CPU",
        )
    columns = raw.shape[1] // codec.block_bytes * codec.block_size
    out = torch.empty(len(raw), columns, dtype=dtype, device=raw.device)
    if out.numel():
        # Triton's interpreter, which stands in on a CPU, takes as long for one lane as for many.
        lanes = _LANES if raw.is_cuda else 1 << (out.numel() - 1).bit_length()
        # Nothing fuses a product with a sum: numpy rounds both.
        _decode[(-(-out.numel() // lanes),)](
            raw,
            _table(codec.name, raw.device),
            out,
            out.numel(),
            WEIGHT=_WEIGHTS[codec.name],
            SIZE=codec.block_size,
            BYTES=codec.block_bytes,
            LANES=lanes,
            enable_fp_fusion=False,
        )
    return out
