"""Weights of the codecs that look groups up in a codebook, and of NVFP4: gguf-py's values to the bit.

A thread computes one weight (``decoding``). Products run in gguf-py's order, and a sign only ever flips a value.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from gguf import quants

from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.gpu.bits import byte, field, half, nibble, short, word


@triton.jit
def _flip(value: tl.tensor, negative: tl.tensor) -> tl.tensor:
    return tl.where(negative != 0, -value, value)


@triton.jit
def _even(signs: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Sign j of eight, stored as seven: the number of negative ones is even."""
    parity = signs ^ (signs >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return ((signs | (parity << 7)) >> j) & 1


@triton.jit
def _iq1(
    scale: tl.tensor, entry: tl.tensor, j: tl.tensor, negative: tl.tensor, table: tl.tensor
) -> tl.tensor:
    return scale * (tl.load(table + entry * 8 + j % 8) + tl.where(negative != 0, -0.125, 0.125))


@triton.jit
def iq1_s(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    e = j // 8
    high = short(at + 34 + j // 32 * 2)
    entry = byte(at + 2 + e) | (((high >> (e % 4 * 3)) & 7) << 8)
    scale = half(at) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    return _iq1(scale, entry, j, high >> 15, table)


@triton.jit
def iq1_m(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    e = j // 8
    high = field(at + 32, e, 4)
    # The block's float16 lies in the top four bits of each group of scales.
    d = (
        short(at + 48) >> 12
        | short(at + 50) >> 12 << 4
        | short(at + 52) >> 12 << 8
        | short(at + 54) >> 12 << 12
    )
    step = (short(at + 48 + j // 64 * 2) >> (j % 64 // 16 * 3)) & 7
    scale = d.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (2 * step + 1).to(tl.float32)
    return _iq1(scale, byte(at + e) | ((high & 7) << 8), j, high & 8, table)


@triton.jit
def iq2_xxs(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    group = at + 2 + j // 32 * 8
    e = j % 32 // 8
    rest = word(group + 4)
    scale = half(at) * (0.5 + ((rest >> 28) & 15).to(tl.float32)) * 0.25
    value = scale * tl.load(table + byte(group + e) * 8 + j % 8)
    return _flip(value, _even((rest >> (e * 7)) & 127, j % 8))


@triton.jit
def iq2_xs(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    code = short(at + 2 + j // 8 * 2)
    scale = half(at) * (0.5 + field(at + 66, j // 16, 4).to(tl.float32)) * 0.25
    return _flip(scale * tl.load(table + (code & 511) * 8 + j % 8), _even(code >> 9, j % 8))


@triton.jit
def iq2_s(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    e = j // 8
    entry = byte(at + 2 + e) | (field(at + 66, e, 2) << 8)
    scale = half(at) * (0.5 + field(at + 74, j // 16, 4).to(tl.float32)) * 0.25
    return _flip(scale * tl.load(table + entry * 8 + j % 8), field(at + 34, j, 1))


@triton.jit
def iq3_xxs(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    rest = word(at + 66 + j // 32 * 4)
    scale = half(at) * (0.5 + ((rest >> 28) & 15).to(tl.float32)) * 0.5
    value = scale * tl.load(table + byte(at + 2 + j // 4) * 4 + j % 4)
    return _flip(value, _even((rest >> (j % 32 // 8 * 7)) & 127, j % 8))


@triton.jit
def iq3_s(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    f = j // 4
    entry = byte(at + 2 + f) | (field(at + 66, f, 1) << 8)
    scale = half(at) * (1 + 2 * field(at + 106, j // 32, 4)).to(tl.float32)
    return _flip(scale * tl.load(table + entry * 4 + j % 4), field(at + 74, j, 1))


@triton.jit
def nvfp4(at: tl.tensor, j: tl.tensor, table: tl.tensor) -> tl.tensor:
    code = byte(at + j // 16)
    e, m = (code >> 3) & 15, (code & 7).to(tl.float32)
    power = ((e + 120) << 23).to(tl.float32, bitcast=True)  # 2^(e - 7)
    scale = tl.where(e == 0, m * 0.001953125, (1.0 + m / 8.0) * power) * 0.5
    scale = tl.where(code == 127, 0.0, scale)
    return scale * tl.load(table + nibble(at + 4, j, 16))


WEIGHTS: dict[str, Any] = {
    each.fn.__name__: each for each in (iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, nvfp4)
}


def table(name: str) -> F32:
    """The codebook of codec ``name``, float32 (entries,): entry by entry, or NVFP4's sixteen values."""
    if name == "nvfp4":
        return np.array(quants.NVFP4.kvalues, np.float32)
    # gguf-py's IQ1_M copies the grid of IQ1_S, which may not be initialized.
    described: Any = getattr(quants, "IQ1_S" if name == "iq1_m" else name.upper())
    described.init_grid()
    found: F32 = described.grid.astype(np.float32).reshape(-1)
    return found
