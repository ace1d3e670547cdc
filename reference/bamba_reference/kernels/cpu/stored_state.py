"""The recurrence with its state rounded after every token; threads divide the heads.

Rounding and random numbers are those of ``torch.stored_state``, operation by operation.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import exp
from bamba_reference.kernels.cpu.launch import (
    FLOAT,
    FLOATS,
    SIZE,
    SIZES,
    Floats,
    Integers,
    compiled,
    empty,
    inlined,
    memory,
    share,
    supported,
)
from bamba_reference.torch import stored_state
from bamba_reference.torch.stored_state import GOLDEN, LEAST_SCALED, StateRounding

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_EXPONENT, _INVERSE, _ONE = 0x7F800000, 0x7F000000, np.float32(1)
# What brings the fraction of a smaller number than 2^22 to a float's last digit: 1.5 · 2^23.
_TO_WHOLE, _LEAST = np.float32(12582912), np.float32(LEAST_SCALED)


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    sequence_starts: Tensor | None,
    rounding: StateRounding,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """``torch.stored_state.recurrence``: y (b, L, H, P) and the state (b, H, P, N) after the last token."""
    (rows, L, H, P), (G, N) = x.shape, B.shape[2:]
    fits = (
        dt.shape == (rows, L, H)
        and B.shape == C.shape == (rows, L, G, N)
        and H % G == 0
        and h.shape == (rows, H, P, N)
        and A.shape in ((H, 1), (H, N))
        and keys.shape == (rows,)
    )
    if not fits or not supported(x, dt, A, B, C, h):
        return stored_state.recurrence(x, dt, A, B, C, h, sequence_starts, rounding, keys)
    kind = rounding.type
    starts = torch.zeros(rows, L, dtype=torch.int64) if sequence_starts is None else sequence_starts.long()
    y, h = empty(rows, L, H, P), h.clone(memory_format=torch.contiguous_format)
    share(
        _recurrence,
        *(memory(each.contiguous()) for each in (x, dt, A, B, C)),
        starts.flatten().numpy(), keys.numpy(), memory(h), memory(y),
        L, H, P, G, N, A.shape[1], *map(np.float32, (2**kind.digits, kind.least, kind.largest_power, kind.most,
        kind.overflow)), int(kind.scaled), int(rounding.seed is not None),
        count=rows * H,
    )  # fmt: skip
    return y, h


@intrinsic
def _power(typing: Any, x: Any) -> Any:
    """The largest power of two that is not above x, for x > 0; 0 below the normal numbers."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        bits = builder.and_(builder.bitcast(args[0], _WORD), ir.Constant(_WORD, _EXPONENT))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(types.float32), generate


@intrinsic
def _inverse(typing: Any, power: Any) -> Any:
    """1 / power of a power of two from 2^-126 to 2^126."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        bits = builder.sub(ir.Constant(_WORD, _INVERSE), builder.bitcast(args[0], _WORD))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(types.float32), generate


def _mix(builder: Any, x: Any) -> Any:
    """``torch.stored_state._mixed`` in 32 bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = builder.mul(
            builder.xor(x, builder.lshr(x, ir.Constant(_WORD, shift))), ir.Constant(_WORD, factor)
        )
    return builder.xor(x, builder.lshr(x, ir.Constant(_WORD, 16)))


@intrinsic
def _row_key(typing: Any, row: Any, key: Any) -> Any:
    """The key of a row of states, from its number and the text's key."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        row, key = (builder.trunc(each, _WORD) for each in args)
        mixed = _mix(builder, builder.xor(_mix(builder, row), key))
        return builder.zext(mixed, ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _threshold(typing: Any, key: Any, n: Any) -> Any:
    """``torch.stored_state._thresholds`` of the state number n of a row."""

    def generate(context: Any, builder: Any, call: Any, args: Any) -> Any:
        key, n = (builder.trunc(each, _WORD) for each in args)
        drawn = _mix(builder, builder.add(key, builder.mul(n, ir.Constant(_WORD, GOLDEN))))
        whole = builder.add(builder.lshr(drawn, ir.Constant(_WORD, 8)), ir.Constant(_WORD, 1))
        return builder.fmul(builder.sitofp(whole, _FLOAT), ir.Constant(_FLOAT, 2.0**-24))

    return types.float32(types.int64, types.int64), generate


@numba.njit(forceinline=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _step(h: Floats, decay: Floats, x: Any, B: Floats, C: Floats) -> Any:
    """h = decay h + x B, and the sum of h C."""
    y = np.float32(0)
    for n in range(len(h)):
        h[n] = h[n] * decay[n] + x * B[n]
        y += h[n] * C[n]
    return y


@inlined
def _round(
    h: Floats, digits: Any, least: Any, largest_power: Any, most: Any, overflow: Any,
    scale: Any, inverse: Any, stochastic: int, key: int,
) -> None:  # fmt: skip
    unit = _ONE / digits
    for n in range(len(h)):
        x = h[n] * inverse
        size = abs(x)
        power = _power(size)
        power = least if power < least else power
        power = largest_power if power > largest_power else power
        steps = size * _inverse(power) * digits
        whole = (steps + _TO_WHOLE) - _TO_WHOLE
        if stochastic:
            whole = whole - _ONE if whole > steps else whole
            whole = whole + _ONE if steps - whole >= _threshold(key, n) else whole
        whole = steps if steps > _TO_WHOLE else whole  # infinity, and NaN stays NaN
        y = whole * (power * unit)
        y = overflow if y > most else y
        h[n] = (-y if x < 0 else y) * scale


@compiled(
    FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, SIZES, SIZES, FLOATS, FLOATS,
    SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, SIZE, SIZE, SIZE, SIZE,
)  # fmt: skip
def _recurrence(
    x: Floats, dt: Floats, A: Floats, B: Floats, C: Floats, starts: Integers, keys: Integers, h: Floats, y: Floats,
    L: int, H: int, P: int, G: int, N: int, columns: int, digits: Any, least: Any, largest_power: Any, most: Any,
    overflow: Any, scaled: int, stochastic: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Heads start … stop of all rows' heads; h (rows, H, P, N) becomes the state after the last token."""
    decay = np.zeros(N, np.float32)
    for place in range(start, stop):
        b, head = place // H, place % H
        group = head // (H // G)
        for t in range(L):
            token = b * L + t
            step = dt[token * H + head]
            for n in range(columns):
                decay[n] = exp(step * A[head * columns + n]) if starts[token] == 0 else np.float32(0)
            if columns == 1:
                for n in range(1, N):
                    decay[n] = decay[0]
            first = (token * G + group) * N
            now_B, now_C = B[first : first + N], C[first : first + N]
            for p in range(P):
                own = h[(place * P + p) * N : (place * P + p + 1) * N]
                at = (token * H + head) * P + p
                y[at] = _step(own, decay, x[at] * step, now_B, now_C)
                scale = inverse = _ONE
                if scaled:
                    greatest = np.float32(0)
                    for n in range(N):
                        greatest = abs(own[n]) if abs(own[n]) > greatest else greatest
                    fits = greatest > _LEAST
                    scale = greatest / most if fits else np.float32(0)
                    inverse = most / greatest if fits else np.float32(0)
                key = _row_key((t * H + head) * P + p, keys[b])
                if stochastic:
                    _round(own, digits, least, largest_power, most, overflow, scale, inverse, 1, key)
                else:
                    _round(own, digits, least, largest_power, most, overflow, scale, inverse, 0, key)
