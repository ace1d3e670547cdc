"""The norms, fused with the gate or the addition to the residual stream before them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import silu
from bamba_reference.kernels.cpu.launch import (
    FLOAT,
    FLOATS,
    LEAST_ROWS,
    SIZE,
    Floats,
    compiled,
    empty,
    memory,
    rows_apart,
    share,
    supported,
)
from bamba_reference.torch import ops as torch_ops


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.ops.rms_norm``: x / rms(x) * weight over the last dimension, (…, d)."""
    if not supported(x, weight) or weight.shape != x.shape[-1:]:
        return torch_ops.rms_norm(x, weight, eps)
    rows = rows_apart(x)
    out = empty(*x.shape)
    share(
        _rms_norm,
        memory(rows), rows.stride(0), memory(weight.contiguous()), memory(out), rows.shape[1], np.float32(eps),
        count=len(rows), least=LEAST_ROWS,
    )  # fmt: skip
    return out


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta and its rms_norm, (…, d) both."""
    if not supported(x, delta, weight) or x.shape != delta.shape or weight.shape != x.shape[-1:]:
        total = x + delta
        return total, torch_ops.rms_norm(total, weight, eps)
    first, second = rows_apart(x), rows_apart(delta)
    total, out = empty(*x.shape), empty(*x.shape)
    share(
        _add_norm,
        memory(first), first.stride(0), memory(second), second.stride(0), memory(weight.contiguous()),
        memory(total), memory(out), first.shape[1], np.float32(eps),
        count=len(first), least=LEAST_ROWS,
    )  # fmt: skip
    return total, out


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """``torch.ops.gated_norm``: rms_norm of y * silu(z) over each of ``groups`` parts, (…, I)."""
    fits = y.shape == z.shape and weight.shape == y.shape[-1:] and y.shape[-1] % groups == 0
    if not fits or not supported(y, z, weight):
        return torch_ops.gated_norm(y, z, weight, groups, eps)
    first, second = rows_apart(y), rows_apart(z)
    out = empty(*y.shape)
    share(
        _gated_norm,
        memory(first), first.stride(0), memory(second), second.stride(0), memory(weight.contiguous()), memory(out),
        groups, first.shape[1] // groups, np.float32(eps),
        count=len(first), least=LEAST_ROWS,
    )  # fmt: skip
    return out


@compiled(FLOATS, SIZE, FLOATS, FLOATS, SIZE, FLOAT, SIZE, SIZE, sums=True)
def _rms_norm(
    x: Floats, step: int, weight: Floats, out: Floats, n: int, eps: float, start: int, stop: int
) -> None:
    for r in range(start, stop):
        v, y = x[r * step : r * step + n], out[r * n : (r + 1) * n]
        squares = np.float32(0)
        for i in range(n):
            squares += v[i] * v[i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
        for i in range(n):
            y[i] = v[i] * scale * weight[i]


@compiled(FLOATS, SIZE, FLOATS, SIZE, FLOATS, FLOATS, FLOATS, SIZE, FLOAT, SIZE, SIZE, sums=True)
def _add_norm(
    x: Floats, x_step: int, delta: Floats, delta_step: int, weight: Floats, total: Floats, out: Floats,
    n: int, eps: float, start: int, stop: int,
) -> None:  # fmt: skip
    for r in range(start, stop):
        u, d = x[r * x_step : r * x_step + n], delta[r * delta_step : r * delta_step + n]
        v, y = total[r * n : (r + 1) * n], out[r * n : (r + 1) * n]
        squares = np.float32(0)
        for i in range(n):
            v[i] = u[i] + d[i]
            squares += v[i] * v[i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
        for i in range(n):
            y[i] = v[i] * scale * weight[i]


@compiled(FLOATS, SIZE, FLOATS, SIZE, FLOATS, FLOATS, SIZE, SIZE, FLOAT, SIZE, SIZE, sums=True)
def _gated_norm(
    y: Floats, y_step: int, z: Floats, z_step: int, weight: Floats, out: Floats,
    groups: int, n: int, eps: float, start: int, stop: int,
) -> None:  # fmt: skip
    """n: elements of a group."""
    for r in range(start, stop):
        for g in range(groups):
            u, gate = (
                y[r * y_step + g * n : r * y_step + (g + 1) * n],
                z[r * z_step + g * n : r * z_step + (g + 1) * n],
            )
            v, w = out[(r * groups + g) * n : (r * groups + g + 1) * n], weight[g * n : (g + 1) * n]
            squares = np.float32(0)
            for i in range(n):
                v[i] = u[i] * silu(gate[i])
                squares += v[i] * v[i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
            for i in range(n):
                v[i] = v[i] * scale * w[i]
