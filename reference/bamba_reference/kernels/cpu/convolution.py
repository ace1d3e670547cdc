"""The causal convolution and its SiLU in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bamba_reference.kernels.cpu.arithmetic import silu
from bamba_reference.kernels.cpu.launch import (
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
from bamba_reference.torch import ops as torch_ops


def conv(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
) -> Tensor:
    """``torch.ops.conv``: xBC (B, L, W), strided but for the last dimension, behind tail (B, K-1, W): (B, L, W)."""
    (B, L, W), K = xBC.shape, weight.shape[1]
    fits = len(weight) == W and tail.shape == (B, K - 1, W) and (bias is None or bias.shape == (W,))
    if not fits or not supported(xBC, weight, bias, tail):
        return torch_ops.conv(xBC, weight, bias, tail, sequence_starts)
    xBC = xBC if xBC.stride(2) == 1 else xBC.contiguous()
    age = torch.full((B, L), K) if sequence_starts is None else torch_ops.ages(sequence_starts)
    out = empty(B, L, W)
    share(
        _conv,
        memory(xBC), *xBC.stride()[:2], memory(tail.contiguous()), memory(weight.t().contiguous()),
        memory(xBC.new_zeros(W) if bias is None else bias.contiguous()), age.flatten().numpy(),
        memory(out), L, W, K,
        count=B * L,
    )  # fmt: skip
    return out


@compiled(FLOATS, SIZE, SIZE, FLOATS, FLOATS, FLOATS, SIZES, FLOATS, SIZE, SIZE, SIZE, SIZE, SIZE)
def _conv(
    x: Floats, row: int, step: int, tail: Floats, taps: Floats, bias: Floats, age: Integers, out: Floats,
    L: int, W: int, K: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Tokens start … stop of all rows' tokens, one after another."""
    for t in range(start, stop):
        b, place = t // L, t % L
        y = out[t * W : (t + 1) * W]
        if K == 4 and min(place, age[t]) >= 3:
            now = b * row + place * step
            _four(x, now, step, taps, bias, y)
            continue
        y[:] = bias
        for back in range(K):
            tap = taps[(K - 1 - back) * W : (K - back) * W]
            if place < back:
                first = (b * (K - 1) + K - 1 + place - back) * W
                earlier = tail[first : first + W]
            elif age[t] >= back:
                first = b * row + (place - back) * step
                earlier = x[first : first + W]
            else:
                continue
            for i in range(W):
                y[i] += earlier[i] * tap[i]
        for i in range(W):
            y[i] = silu(y[i])


@inlined
def _four(x: Floats, now: int, step: int, taps: Floats, bias: Floats, y: Floats) -> None:
    """The token at x[now] with three before it, in two passes: LLVM checks few arrays for overlaps."""
    W = len(y)
    oldest, older, old = x[now - 3 * step :][:W], x[now - 2 * step :][:W], x[now - step :][:W]
    newest = x[now : now + W]
    first, second, third, fourth = taps[:W], taps[W : 2 * W], taps[2 * W : 3 * W], taps[3 * W :]
    for i in range(W):
        y[i] = bias[i] + oldest[i] * first[i] + older[i] * second[i]
    for i in range(W):
        y[i] = silu(y[i] + old[i] * third[i] + newest[i] * fourth[i])
