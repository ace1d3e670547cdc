"""Causal depthwise convolution and SiLU in Triton: ``torch.ops.conv`` in one pass over strided input.

A token's sum is kept in float32 and rounded once, to the input's dtype.
"""
# Triton's own meaning of this syntax: tuples grow by adding.
# mypy: disable-error-code="untyped-decorator, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels.launch import check, padded, rows_apart

_TOKENS, _CHANNELS, _WARPS = 32, 128, 4


def conv(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
) -> Tensor:
    """``torch.ops.conv``: xBC (B, L, W), strided along B and L, behind tail (B, K-1, W) -> (B, L, W), contiguous.

    The result has xBC's dtype.
    """
    check(xBC)
    xBC, tail = rows_apart(xBC), rows_apart(tail)
    B, L, W = xBC.shape
    out = torch.empty(B, L, W, dtype=xBC.dtype, device=xBC.device)
    tokens = padded(L, least=1, most=_TOKENS)
    grid = (-(-L // tokens), -(-W // _CHANNELS), B)
    _conv[grid](
        xBC,
        weight,
        bias,
        tail,
        sequence_starts,
        None,
        None,
        out,
        L,
        W,
        *xBC.stride()[:2],
        *weight.stride(),
        *tail.stride()[:2],
        0,
        0,
        K=weight.shape[1],
        TOKENS=tokens,
        CHANNELS=_CHANNELS,
        num_warps=_WARPS,
    )
    return out


def gradient_before_silu(
    gradient: Tensor,
    xBC: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    sequence_starts: Tensor | None,
    weighted: bool,
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of ``conv``'s result (B, L, W) that of its sums before SiLU, float32 (B, L, W).

    If ``weighted``, also the gradients of the taps, the current token's first, and of the bias: (K + 1, W) float32.
    """
    xBC, tail, gradient = rows_apart(xBC), rows_apart(tail), rows_apart(gradient)
    B, L, W = xBC.shape
    K, tokens, channels = weight.shape[1], padded(L, least=1, most=_TOKENS), _CHANNELS // 2
    grid = (-(-L // tokens), -(-W // channels), B)
    out, sums = torch.empty(B, L, W, dtype=torch.float32, device=xBC.device), None
    if weighted:
        sums = torch.empty(B * grid[0], K + 1, W, dtype=torch.float32, device=xBC.device)
    _conv[grid](
        xBC,
        weight,
        bias,
        tail,
        sequence_starts,
        gradient,
        sums,
        out,
        L,
        W,
        *xBC.stride()[:2],
        *weight.stride(),
        *tail.stride()[:2],
        *gradient.stride()[:2],
        K=K,
        TOKENS=tokens,
        CHANNELS=channels,
        num_warps=_WARPS,
    )
    return out, None if sums is None else sums.sum(0)


def conv_in_place(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
) -> Tensor:
    """``conv`` of one token a row (B, 1, W), which also appends the token to ``tail`` in place.

    Each channel reads only its own tail, so that it may write it.
    """
    xBC = rows_apart(xBC)
    B, _, W = xBC.shape
    out = torch.empty(B, 1, W, dtype=xBC.dtype, device=xBC.device)
    _conv_token[(-(-W // _CHANNELS), B)](
        xBC,
        weight,
        bias,
        tail,
        out,
        W,
        xBC.stride(0),
        *weight.stride(),
        *tail.stride()[:2],
        K=weight.shape[1],
        CHANNELS=_CHANNELS,
    )
    return out


@triton.jit
def _conv(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tail: tl.tensor,
    sequence_starts: tl.tensor,
    gradient: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    L: tl.tensor,
    W: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    weight_channel: tl.tensor,
    weight_tap: tl.tensor,
    tail_row: tl.tensor,
    tail_token: tl.tensor,
    gradient_row: tl.tensor,
    gradient_token: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """The convolution; with ``gradient``, that of its result, the gradient of the sums before SiLU."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # (T,)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # (W,)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < W, other=0).to(tl.float32)[None, :]
    inputs = ()
    seen = t < L  # whether the token `back` positions ago belongs to the same sequence
    for back in tl.static_range(K):
        tap = tl.load(weight + c * weight_channel + (K - 1 - back) * weight_tap, mask=c < W, other=0)
        at = t - back  # (T,)
        earlier = tl.load(
            x + row * x_row + at[:, None] * x_token + c[None, :],
            mask=(seen & (at >= 0))[:, None] & (c < W)[None, :],
            other=0,
        ).to(tl.float32)  # (T, W)
        if back > 0:
            earlier += tl.load(
                tail + row * tail_row + (at[:, None] + K - 1) * tail_token + c[None, :],
                mask=(seen & (at < 0))[:, None] & (c < W)[None, :],
                other=0,
            ).to(tl.float32)
        total += tap.to(tl.float32)[None, :] * earlier
        inputs = inputs + (earlier,)
        if sequence_starts is not None:
            begins = tl.load(sequence_starts + row * L + at, mask=(at >= 0) & (at < L), other=0).to(tl.int32)
            seen = seen & (begins == 0)
    here = (t < L)[:, None] & (c < W)[None, :]
    if gradient is None:
        y = total / (1 + tl.exp(-total))
    else:
        sigmoid = 1 / (1 + tl.exp(-total))
        gradient += row * gradient_row + t[:, None] * gradient_token + c[None, :]
        y = tl.load(gradient, mask=here, other=0).to(tl.float32) * sigmoid * (1 + total * (1 - sigmoid))
        if sums is not None:
            sums += (row * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * W + c
            for back in tl.static_range(K):
                tl.store(sums + back * W, tl.sum(y * inputs[back], axis=0), mask=c < W)
            tl.store(sums + K * W, tl.sum(y, axis=0), mask=c < W)
    tl.store(out + (row * L + t[:, None]) * W + c[None, :], y.to(out.dtype.element_ty), mask=here)


@triton.jit
def _conv_token(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tail: tl.tensor,
    out: tl.tensor,
    W: tl.tensor,
    x_row: tl.tensor,
    weight_channel: tl.tensor,
    weight_tap: tl.tensor,
    tail_row: tl.tensor,
    tail_token: tl.tensor,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)  # (W,)
    new = tl.load(x + row * x_row + c, mask=c < W, other=0)
    total = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < W, other=0).to(tl.float32)
    tap = tl.load(weight + c * weight_channel + (K - 1) * weight_tap, mask=c < W, other=0)
    total += tap.to(tl.float32) * new.to(tl.float32)
    place = tail + row * tail_row + c
    for k in tl.static_range(K - 1):
        earlier = tl.load(place + k * tail_token, mask=c < W, other=0)
        tap = tl.load(weight + c * weight_channel + k * weight_tap, mask=c < W, other=0)
        total += tap.to(tl.float32) * earlier.to(tl.float32)
        if k > 0:
            tl.store(place + (k - 1) * tail_token, earlier, mask=c < W)
    if K > 1:
        tl.store(place + (K - 2) * tail_token, new.to(tail.dtype.element_ty), mask=c < W)
    tl.store(out + row * W + c, (total / (1 + tl.exp(-total))).to(out.dtype.element_ty), mask=c < W)
