"""Block codecs dequantized on the device: raw blocks in, weights out, numpy's values to the bit.

A thread computes one weight from its block's bytes, by the table of the codec's layout. Weights are float32 and are
rounded once, to the dtype asked for.
"""
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.codecs.gpu.bits import byte, half
from bamba_quant.codecs.layout import BlockLayout, Field
from bamba_quant.errors import FormatError
from bamba_reference.runtime.triton_cache import name_errors

name_errors()

_LANES = 1024
_HEADER = 9  # numbers of a layout before those of its fields


def _numbers(layout: BlockLayout) -> tuple[int, ...]:
    """A layout as kernels take it: its constants, where each field's numbers begin (0: no field), and these."""
    fields: list[int] = []
    starts = []
    for field in (layout.codes, layout.scales, layout.minima):
        starts.append(_HEADER + len(fields) if field else 0)
        fields += _field_numbers(field) if field else []
    dmin = -1 if layout.dmin is None else layout.dmin
    flags = map(int, (layout.added, layout.exponent, layout.table is not None))
    return layout.group, layout.d, dmin, *flags, *starts, *fields


def _field_numbers(field: Field) -> list[int]:
    """How many ``Bits`` there are, what to flip and what to subtract at the end; then nine numbers for each."""
    sign = 1 << 7 if field.signed else 0
    numbers = [len(field.bits), sign, sign or field.zero]
    for bits in field.bits:
        partial = int(bits.count < field.count)
        numbers += [
            bits.at,
            bits.width,
            bits.count,
            bits.run,
            bits.low,
            bits.first,
            bits.shift,
            bits.per_byte,
            partial,
        ]
    return numbers


@triton.jit
def _bits(at: tl.tensor, j: tl.tensor, LAYOUT: tl.constexpr, START: tl.constexpr) -> tl.tensor:
    """``layout.Bits`` of integer j, where they are in it."""
    AT: tl.constexpr = LAYOUT[START]
    WIDTH: tl.constexpr = LAYOUT[START + 1]
    COUNT: tl.constexpr = LAYOUT[START + 2]
    RUN: tl.constexpr = LAYOUT[START + 3]
    LOW: tl.constexpr = LAYOUT[START + 4]
    FIRST: tl.constexpr = LAYOUT[START + 5]
    SHIFT: tl.constexpr = LAYOUT[START + 6]
    PER_BYTE: tl.constexpr = LAYOUT[START + 7]
    PARTIAL: tl.constexpr = LAYOUT[START + 8]
    k = j - FIRST
    inside = (k >= 0) & (k < COUNT)
    if PARTIAL:
        k = tl.where(inside, k, 0)
    both = byte(at + AT + k // (RUN * PER_BYTE) * RUN + k % RUN)
    part = ((both >> (SHIFT + k // RUN % PER_BYTE * WIDTH)) & ((1 << WIDTH) - 1)) << LOW
    if PARTIAL:
        part = tl.where(inside, part, 0)
    return part


@triton.jit
def _integer(at: tl.tensor, j: tl.tensor, LAYOUT: tl.constexpr, START: tl.constexpr) -> tl.tensor:
    """Integer j of the field whose numbers begin at ``START``, as float32."""
    PARTS: tl.constexpr = LAYOUT[START]
    value = _bits(at, j, LAYOUT, START + 3)
    for i in tl.static_range(1, PARTS):
        value = value | _bits(at, j, LAYOUT, START + 3 + 9 * i)
    return ((value ^ LAYOUT[START + 1]) - LAYOUT[START + 2]).to(tl.float32)


@triton.jit
def _power(e: tl.tensor) -> tl.tensor:
    """``layout.half_powers``."""
    return tl.where(e < 2, (e + 1) * 0x00200000, (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weight(at: tl.tensor, j: tl.tensor, table: tl.tensor, LAYOUT: tl.constexpr) -> tl.tensor:
    """``BlockLayout.dequantize`` of weight j of the block at ``at``."""
    GROUP: tl.constexpr = LAYOUT[0]
    D: tl.constexpr = LAYOUT[1]
    DMIN: tl.constexpr = LAYOUT[2]
    SCALES: tl.constexpr = LAYOUT[7]
    MINIMA: tl.constexpr = LAYOUT[8]
    value = _integer(at, j, LAYOUT, LAYOUT[6])
    if LAYOUT[5]:
        value = tl.load(table + value.to(tl.int32))
    step = _power(byte(at + D)) if LAYOUT[4] else half(at + D)
    if SCALES:
        step = step * _integer(at, j // GROUP, LAYOUT, SCALES)
    value = step * value
    if DMIN >= 0:
        low = half(at + DMIN)
        if LAYOUT[3]:
            low = -low
        if MINIMA:
            low = low * _integer(at, j // GROUP, LAYOUT, MINIMA)
        value = value - low
    return value


@triton.jit
def _decode(
    raw: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    LAYOUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    # Lanes past the end read the last weight again.
    position = tl.minimum(index, n - 1)
    at, j = raw + position // SIZE * BYTES, (position % SIZE).to(tl.int32)
    value = _weight(at, j, table, LAYOUT) if WEIGHT is None else WEIGHT(at, j, table)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=index < n)


_tables: dict[tuple[str, torch.device], torch.Tensor] = {}


def _on(device: torch.device, name: str, table: F32 | None) -> torch.Tensor:
    """What the codes of a codec are looked up in, on the device; where they are not, a number that no kernel reads."""
    if (name, device) not in _tables:
        _tables[name, device] = torch.from_numpy(np.zeros(1, np.float32) if table is None else table).to(
            device
        )
    return _tables[name, device]


@cache
def _function(module: str, name: str) -> tuple[Any, F32 | None]:
    """The function that reads a weight of a codec without a layout, and what it looks up."""
    found = importlib.import_module(module)
    return found.WEIGHTS[name], found.table(name)


def decode(codec: BlockCodec, raw: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``BlockCodec.dequantize`` on raw's device: uint8 (rows, row_bytes) to (rows, n) of a float dtype.

    Raises ``FormatError`` for a codec that a GPU cannot read.
    """
    raw = raw.contiguous()
    if codec.dtype is not None:
        return raw.view(getattr(torch, codec.dtype.name)).to(dtype)
    if codec.layout is not None:
        weight, table, numbers = None, codec.layout.table, _numbers(codec.layout)
    elif codec.gpu:
        (weight, table), numbers = _function(codec.gpu, codec.name), ()
    else:
        raise FormatError(f"{codec.name} cannot be read on a GPU", fix="read it on the CPU")
    columns = raw.shape[1] // codec.block_bytes * codec.block_size
    out = torch.empty(len(raw), columns, dtype=dtype, device=raw.device)
    if out.numel():
        # Triton's interpreter on a CPU takes as long for one lane as for many.
        lanes = _LANES if raw.is_cuda else 1 << (out.numel() - 1).bit_length()
        # Nothing fuses a product with a sum: numpy rounds both.
        _decode[(-(-out.numel() // lanes),)](
            raw,
            _on(raw.device, codec.name, table),
            out,
            out.numel(),
            LAYOUT=numbers,
            WEIGHT=weight,
            SIZE=codec.block_size,
            BYTES=codec.block_bytes,
            LANES=lanes,
            enable_fp_fusion=False,
        )
    return out
