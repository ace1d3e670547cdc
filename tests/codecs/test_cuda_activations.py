"""The kernel that rounds activations gives torch's codes and scales, bit for bit: on a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernels import DEVICE, needs_triton

needs_triton()

from bamba_quant.checkpoint.packed import Activations
from bamba_quant.codecs.fp8.activations import quantize_by_token
from bamba_quant.evaluation.fp8_activations import quantized

# The interpreter takes a second for a few tokens.
EXAMPLES = 30 if DEVICE.type == "cuda" else 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    columns=st.sampled_from([1, 48, 256, 4096, 5000]), power=st.integers(-60, 60), seed=st.integers(0, 2**31)
)
def test_by_token(dtype: torch.dtype, columns: int, power: int, seed: int) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x[1] = 0
    x[2, ::3] *= 1e-5
    x = x.to(dtype).nan_to_num(0, 0, 0).to(DEVICE)
    codes, scale = quantize_by_token(x, 64)
    expected, scales = quantized(x, Activations("token"))
    assert torch.equal(scale, scales)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_what_is_no_number_stays_none() -> None:
    """Else a model that has gone wrong would show good figures."""
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 5], x[2, 7], x[3, 70], x[3, 1] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    codes, scale = quantize_by_token(x.to(DEVICE), 64)
    expected, scales = quantized(x.to(DEVICE), Activations("token"))
    assert torch.equal(scale, scales)
    torch.testing.assert_close(codes.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    assert codes.float().isnan().any(dim=1).tolist() == [True, True, True, True, False]


def test_every_code_and_every_tie() -> None:
    """All e4m3 numbers and the middles between neighbours, which go to the even one."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, -numbers, -middles])[None].to(DEVICE)
    codes, scale = quantize_by_token(x)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(codes.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
