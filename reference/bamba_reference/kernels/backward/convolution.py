"""Causal convolution with gradients: ``kernels.convolution`` forward; backward its sums again, and the way back.

Only inputs are kept. The gradient of the sums before SiLU is float32; a token's own is a sum over the tokens that saw
it, rounded once.
"""
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bamba_reference.kernels import convolution
from bamba_reference.kernels.launch import padded

_TOKENS, _CHANNELS = 32, 128


def conv(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, sequence_starts: Tensor | None
) -> Tensor:
    """``torch.ops.conv``: xBC (B, L, W), strided along B and L, behind tail (B, K-1, W) -> (B, L, W) in its dtype."""
    y: Tensor = _Conv.apply(xBC, weight, bias, tail, sequence_starts)
    return y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        xBC: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor,
        sequence_starts: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(xBC, weight, bias, tail, sequence_starts)
        return convolution.conv(xBC, weight, bias, tail, sequence_starts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        xBC, weight, bias, tail, sequence_starts = ctx.saved_tensors
        to_xBC, of_weight, of_bias, to_tail, _ = ctx.needs_input_grad
        found, sums = convolution.gradient_before_silu(
            gradient, xBC, weight, bias, tail, sequence_starts, of_weight or of_bias
        )
        (B, L, W), K = xBC.shape, weight.shape[1]
        before = inputs = None
        if to_xBC or to_tail:
            # Of the tail and the tokens, in one.
            both = torch.empty(B, K - 1 + L, W, dtype=xBC.dtype, device=xBC.device)
            tokens = padded(K - 1 + L, least=1, most=_TOKENS)
            _inputs_gradient[(-(-(K - 1 + L) // tokens), -(-W // _CHANNELS), B)](
                found,
                weight,
                sequence_starts,
                both,
                L,
                W,
                *weight.stride(),
                K=K,
                TOKENS=tokens,
                CHANNELS=_CHANNELS,
            )
            before, inputs = both.split([K - 1, L], dim=1)
        return (
            inputs,
            sums[:K].flip(0).t().to(weight.dtype) if sums is not None else None,
            sums[K].to(bias.dtype) if of_bias and sums is not None else None,
            before.to(tail.dtype) if before is not None else None,
            None,
        )


@triton.jit
def _inputs_gradient(
    gradient: tl.tensor,
    weight: tl.tensor,
    sequence_starts: tl.tensor,
    out: tl.tensor,
    L: tl.tensor,
    W: tl.tensor,
    weight_channel: tl.tensor,
    weight_tap: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    row = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # (T,), the tail first
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # (W,)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sees = place < L + K - 1  # whether the token `ahead` positions later is of the same sequence
    for ahead in tl.static_range(K):
        t = place - (K - 1) + ahead
        there = sees & (t >= 0) & (t < L)
        tap = tl.load(weight + c * weight_channel + (K - 1 - ahead) * weight_tap, mask=c < W, other=0)
        later = tl.load(
            gradient + (row * L + t[:, None]) * W + c[None, :],
            mask=there[:, None] & (c < W)[None, :],
            other=0,
        )
        total += tap.to(tl.float32)[None, :] * later
        if sequence_starts is not None:
            begins = tl.load(sequence_starts + row * L + t + 1, mask=(t >= -1) & (t < L - 1), other=0)
            sees = sees & (begins.to(tl.int32) == 0)
    tl.store(
        out + (row * (L + K - 1) + place[:, None]) * W + c[None, :],
        total.to(out.dtype.element_ty),
        mask=(place < L + K - 1)[:, None] & (c < W)[None, :],
    )
