"""Measures the Triton kernels of decoding on a GPU: `python -m benchmarks.one_token_cuda`.

As ``kernels_cuda`` does, which holds these contests too: products of a few rows beside cuBLAS's, attention of one token
beside torch's, the convolution of one token beside causal_conv1d's, and the norm that stands alone. Shapes are
Bamba-9B's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import contests
from benchmarks.contests import EPS, FFN, INNER, LENGTHS, WIDTH, Contest, Contests, doubles

HEADS, KEYS, HEAD, STATE = 32, 8, 128, 128


def product_contests(dtype: torch.dtype, rows: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels import matmul, norms
    from bamba_reference.torch import ops as torch_ops

    case = f"{str(dtype)[6:]:9}{rows} rows"
    x = torch.randn(rows, 1, WIDTH, device="cuda").to(dtype)
    residual = torch.randn(rows, 1, FFN, device="cuda").to(dtype)
    gate, up = (WIDTH**-0.5 * torch.randn(2, FFN, WIDTH, device="cuda")).to(dtype)
    bias = torch.randn(FFN, device="cuda").to(dtype)

    def product(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In float64."""
        return torch_ops.linear(*doubles(x, weight, bias), "")

    yield Contest(
        "few rows, gated",
        case,
        lambda: (torch_ops.swiglu(product(gate), product(up)),),
        lambda: (matmul.few_rows(x, gate, gated=up),),
        lambda: (F.silu(F.linear(x, gate)) * F.linear(x, up),),
        timed,
        "torch",
    )
    yield Contest(
        "few rows, added",
        case,
        lambda: (residual.double() + product(gate, bias),),
        lambda: (matmul.few_rows(x, gate, bias=bias, residual=residual),),
        lambda: (residual + F.linear(x, gate, bias),),
        timed,
        "torch",
    )
    weight = (1 + 0.3 * torch.randn(WIDTH, device="cuda")).to(dtype)
    yield Contest(
        "norm",
        case,
        lambda: (torch_ops.rms_norm(*doubles(x, weight), EPS),),
        lambda: (norms.rms_norm(x, weight, EPS),),
        lambda: (F.rms_norm(x, (WIDTH,), weight, EPS),),
        timed,
        "torch",
    )


def convolution_contest(theirs: Any, dtype: torch.dtype, rows: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels import convolution
    from bamba_reference.torch import ops as torch_ops

    width = INNER + 2 * STATE
    xBC = torch.randn(rows, 1, INNER + width, device="cuda").to(dtype)[..., INNER:]
    weight, bias = (
        (0.5 * torch.randn(width, 4, device="cuda")).to(dtype),
        torch.randn(width, device="cuda").to(dtype),
    )
    tail = torch.randn(rows, 3, width, device="cuda").to(dtype)
    # Both write theirs: the first call is the one that counts.
    mine, other = tail.clone(), tail.transpose(1, 2).contiguous()
    if theirs.conv_step:
        yield Contest(
            "conv, one token",
            f"{str(dtype)[6:]:9}{rows} rows",
            lambda: (torch_ops.conv(*doubles(xBC, weight, bias, tail), None), torch_ops.next_tail(tail, xBC)),
            lambda: (convolution.conv_in_place(xBC, weight, bias, mine, None), mine),
            lambda: (
                theirs.conv_step(xBC[:, 0], other, weight, bias, activation="silu")[:, None],
                other.transpose(1, 2),
            ),
            timed,
            "causal_conv1d",
        )


def attention_contest(dtype: torch.dtype, places: int, timed: bool) -> Iterator[Contest]:
    from bamba_reference.kernels.attention import decode_attention
    from bamba_reference.torch import ops as torch_ops

    q = torch.randn(2, 1, HEADS, HEAD, device="cuda").to(dtype)
    k, v = torch.randn(2, 2, places + 9, KEYS, HEAD, device="cuda").to(dtype)  # with room for more
    scale, seen = HEAD**-0.5, (k[:, :places], v[:, :places])
    last, starts = torch.tensor([places - 1], device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")

    def torchs() -> tuple[Tensor, ...]:
        turned = (t.transpose(1, 2) for t in (q, *seen))
        return (F.scaled_dot_product_attention(*turned, scale=scale, enable_gqa=True).transpose(1, 2),)

    yield Contest(
        "attention",
        f"{str(dtype)[6:]:9}of {places} places",
        lambda: (torch_ops.attention(*doubles(q, *seen), scale, None, None),),
        lambda: (decode_attention(q, k, v, scale, last, starts),),
        torchs,
        timed,
        "torch",
    )


def all_contests(theirs: Any, dtype: torch.dtype, times: bool) -> Iterator[Contests]:
    for rows in (1,) if times else (1, 3, 4):
        yield partial(product_contests, dtype, rows, timed=times)
        yield partial(convolution_contest, theirs, dtype, rows, timed=times)
    for places in LENGTHS[-1:] if times else LENGTHS:
        yield partial(attention_contest, dtype, places, timed=times)


if __name__ == "__main__":
    contests.main("benchmarks.one_token_cuda", __doc__)
