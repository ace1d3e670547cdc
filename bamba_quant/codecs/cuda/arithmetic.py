"""The arithmetic of ``bamba_quant.codecs.arithmetic`` in Triton, one lane a thread, bit for bit.

Kernels are launched with fusing off (``enable_fp_fusion=False``), and a quotient is ``div_rn``: Triton's own
``/`` may be two units off. A GPU's NaN differs from x86's in its bits, so the two places that look at bits
put it right.
"""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_lanes(LANES: tl.constexpr) -> tl.tensor:
    """The block of each lane."""
    return tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)


@triton.jit
def group_lanes(n: tl.tensor, groups: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """The group and the block of each lane, a lane a group of n blocks; block n past the end."""
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return index // n, tl.where(index < n * groups, index % n, n)


@triton.jit
def load_rows(x: tl.tensor, first: tl.tensor, n: tl.tensor, lane: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Rows first … first + N - 1 of (…, n) as a tuple, 0 in lanes past the end."""
    rows = ()
    for i in tl.static_range(N):
        rows = rows + (load_row(x, first + i, n, lane),)
    return rows


@triton.jit
def load_codes(x: tl.tensor, first: tl.tensor, n: tl.tensor, lane: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """As ``load_rows``, of floats that hold integers, as integers."""
    rows = ()
    for i in tl.static_range(N):
        rows = rows + (load_row(x, first + i, n, lane).to(tl.int32),)
    return rows


@triton.jit
def load_row(x: tl.tensor, row: tl.tensor, n: tl.tensor, lane: tl.tensor) -> tl.tensor:
    return tl.load(x + row * n + lane, mask=lane < n, other=0)


@triton.jit
def store_row(out: tl.tensor, row: tl.tensor, n: tl.tensor, lane: tl.tensor, value: tl.tensor) -> tl.tensor:
    tl.store(out + row * n + lane, value, mask=lane < n)


@triton.jit
def like(v: tl.tensor, number: tl.tensor) -> tl.tensor:
    """A number in every lane of v."""
    return tl.full(v.shape, number, tl.float32)


@triton.jit
def bits_of(v: tl.tensor) -> tl.tensor:
    return v.to(tl.int32, bitcast=True)


@triton.jit
def nearest_int(v: tl.tensor) -> tl.tensor:
    """Half to even; wraps beyond ±2^22 as ggml-quants.c:621 does, and is 0 for NaN as its bits are on x86."""
    return tl.where(v == v, bits_of(v + 12582912.0) & 0x007FFFFF, 0x00400000) - 0x00400000


@triton.jit
def nearest_clipped(v: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """``nearest_int`` clipped to [low, high], as floats."""
    return tl.maximum(tl.minimum(nearest_int(v), high), low).to(tl.float32)


@triton.jit
def truncate(v: tl.tensor) -> tl.tensor:
    """C's (int) cast as x86 performs it: -2^31 for NaN and whatever does not fit."""
    return tl.where(tl.abs(v) < 2147483648.0, v, -2147483648.0).to(tl.int32)


@triton.jit
def floor_int(v: tl.tensor) -> tl.tensor:
    """The greatest integer up to v, which must fit; libdevice's floor would take subnormals for 0."""
    whole = v.to(tl.int32)
    return whole - (whole.to(tl.float32) > v).to(tl.int32)


@triton.jit
def round_half_away(v: tl.tensor) -> tl.tensor:
    """C's roundf as integers, by truncation, whose remainder is exact in float32."""
    whole = truncate(v)
    rest = v - whole.to(tl.float32)
    up = (rest >= 0.5) & (rest < 1.0)
    down = (rest <= -0.5) & (rest > -1.0)
    return whole + up.to(tl.int32) - down.to(tl.int32)


@triton.jit
def reciprocal(d: tl.tensor) -> tl.tensor:
    """1/d, and 0 where d is 0."""
    return tl.where(d != 0, tl.div_rn(like(d, 1.0), d), 0.0)


@triton.jit
def ratio(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    """numerator/denominator where the denominator is positive, else 0."""
    return tl.where(denominator > 0, tl.div_rn(numerator, denominator), 0.0)


@triton.jit
def largest(rows: tl.tuple) -> tl.tensor:
    """The signed value of the first strictly greatest magnitude in a tuple of rows; 0 where all are 0."""
    value = like(rows[0], 0.0)
    for i in tl.static_range(len(rows)):
        value = tl.where(tl.abs(rows[i]) > tl.abs(value), rows[i], value)
    return value


@triton.jit
def to_half(d: tl.tensor) -> tl.tensor:
    """The sixteen bits of d as float16, half to even; x86's NaN is negative."""
    bits = d.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(d == d, bits, 0xFE00)


@triton.jit
def from_half(half: tl.tensor) -> tl.tensor:
    """The float32 that sixteen bits of float16 stand for."""
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def store_half(out: tl.tensor, row: tl.tensor, n: tl.tensor, lane: tl.tensor, half: tl.tensor) -> tl.tensor:
    """Two bytes of each lane, the low one first."""
    store_row(out, row, n, lane, half.to(tl.uint8))
    store_row(out, row + 1, n, lane, (half >> 8).to(tl.uint8))
