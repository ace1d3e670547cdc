"""SwiGLU, ReLU², the rotary embedding and sums over tokens, each in one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import silu
from bamba_reference.kernels.cpu.launch import (
    DOUBLES,
    FLOAT,
    FLOATS,
    LEAST_ROWS,
    SIZE,
    Doubles,
    Floats,
    compiled,
    empty,
    memory,
    rows_apart,
    share,
    supported,
)
from bamba_reference.torch import ops as torch_ops


def swiglu(gate: Tensor, up: Tensor, multiplier: float = 1.0) -> Tensor:
    """``torch.ops.swiglu``: silu(gate * multiplier) * up, (…, F)."""
    if not supported(gate, up) or gate.shape != up.shape:
        return torch_ops.swiglu(gate, up, multiplier)
    first, second = rows_apart(gate), rows_apart(up)
    out = empty(*gate.shape)
    share(
        _swiglu,
        memory(first), first.stride(0), memory(second), second.stride(0), memory(out),
        np.float32(multiplier), first.shape[1],
        count=len(first), least=LEAST_ROWS,
    )  # fmt: skip
    return out


@compiled(FLOATS, SIZE, FLOATS, SIZE, FLOATS, FLOAT, SIZE, SIZE, SIZE)
def _swiglu(
    gate: Floats, gate_step: int, up: Floats, up_step: int, out: Floats, multiplier: float, n: int,
    start: int, stop: int,
) -> None:  # fmt: skip
    for r in range(start, stop):
        g, u = gate[r * gate_step : r * gate_step + n], up[r * up_step : r * up_step + n]
        y = out[r * n : (r + 1) * n]
        for i in range(n):
            y[i] = silu(g[i] * multiplier) * u[i]


def relu2(x: Tensor) -> Tensor:
    """``torch.ops.relu2``: relu(x)², (…, F)."""
    if not supported(x):
        return torch_ops.relu2(x)
    rows = rows_apart(x)
    out = empty(*x.shape)
    share(
        _relu2,
        memory(rows), rows.stride(0), memory(out), rows.shape[1],
        count=len(rows), least=LEAST_ROWS,
    )  # fmt: skip
    return out


@compiled(FLOATS, SIZE, FLOATS, SIZE, SIZE, SIZE)
def _relu2(x: Floats, step: int, out: Floats, n: int, start: int, stop: int) -> None:
    for r in range(start, stop):
        v, y = x[r * step : r * step + n], out[r * n : (r + 1) * n]
        for i in range(n):
            positive = max(v[i], np.float32(0))
            y[i] = positive * positive


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``torch.ops.rotary``: x (B, L, n, E), cos and sin (B or 1, L, r/2)."""
    (B, L, heads, E), half = x.shape, cos.shape[-1]
    fits = len(cos) in (1, B) and cos.shape[1:] == (L, half) and cos.shape == sin.shape and 2 * half <= E
    if not fits or not supported(x, cos, sin):
        return torch_ops.rotary(x, cos, sin)
    tokens = rows_apart(x.flatten(2))
    out = empty(*x.shape)
    share(
        _rotary,
        memory(tokens), tokens.stride(0), memory(cos.contiguous()), memory(sin.contiguous()), memory(out),
        len(cos) * L, heads, E, half,
        count=B * L, least=LEAST_ROWS,
    )  # fmt: skip
    return out


@compiled(FLOATS, SIZE, FLOATS, FLOATS, FLOATS, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE)
def _rotary(
    x: Floats, step: int, cos: Floats, sin: Floats, out: Floats,
    angles: int, heads: int, E: int, half: int, start: int, stop: int,
) -> None:  # fmt: skip
    """``angles``: rows of cos and sin; rows of x beyond them start again from the first."""
    for t in range(start, stop):
        first = t % angles * half
        c, s = cos[first : first + half], sin[first : first + half]
        for h in range(heads):
            v = x[t * step + h * E : t * step + (h + 1) * E]
            y = out[(t * heads + h) * E : (t * heads + h + 1) * E]
            for i in range(half):
                y[i] = v[i] * c[i] - v[half + i] * s[i]
                y[half + i] = v[half + i] * c[i] + v[i] * s[i]
            for i in range(2 * half, E):
                y[i] = v[i]


def column_sums(x: Tensor) -> Tensor:
    """``torch.ops.column_sums``: Σ x² and Σ x over all dimensions of x (…, n) but the last, added up in float64."""
    if not supported(x) or x.dim() < 2 or not x.numel():
        return torch_ops.column_sums(x)
    rows = rows_apart(x)
    T, n = rows.shape
    out = np.zeros(2 * n)
    share(_column_sums, memory(rows), rows.stride(0), T, n, out, count=n, least=256)
    return torch.from_numpy(out).view(2, n)


@compiled(FLOATS, SIZE, SIZE, SIZE, DOUBLES, SIZE, SIZE)
def _column_sums(x: Floats, step: int, T: int, n: int, out: Doubles, start: int, stop: int) -> None:
    squares, sums = out[start:stop], out[n + start : n + stop]
    for t in range(T):
        v = x[t * step + start : t * step + stop]
        for i in range(stop - start):
            value = np.float64(v[i])
            squares[i] += value * value
            sums[i] += value
