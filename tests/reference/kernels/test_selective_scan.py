"""The kernel of Mamba's recurrence gives what the torch definition gives in float64, however tokens are cut up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bamba_reference.kernels.backend import TRITON
from bamba_reference.kernels.selective_scan import SelectiveScanTuning, selective_scan
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.backend import BackendError
from bamba_reference.torch.scan import SelectiveScanArguments
from tests.reference.cases import relative_error
from tests.reference.kernels.test_operations import every_dtype
from tests.reference.operations import RECURRENT, assert_rounded_once, doubles, draw, random_starts
from tests.support.kernels import DEVICE

# x, dt, B, C and z go token by token.
BY_TOKEN = (0, 1, 3, 4, 6)


def arguments(dtype: torch.dtype, L: int, inner: int, N: int, seed: int) -> list[Any]:
    """As a mixer has them: x convolved, dt of its own, z and B and C parts of projections; steps from 0.001 to 1."""
    normal = draw(seed)
    z = normal(2, L, 2 * inner, dtype=dtype)[..., inner:]
    B, C = normal(2, L, 3 + 2 * N, dtype=dtype)[..., 3:].split([N, N], dim=-1)
    A_log = torch.log(1 + 15 * torch.rand(inner, N, generator=torch.Generator().manual_seed(seed)))
    return [
        normal(2, L, inner, dtype=dtype),
        normal(2, L, inner, dtype=dtype),
        A_log.to(DEVICE),
        B,
        C,
        normal(inner),
        z,
        2 * normal(inner) - 3,
        normal(2, inner, N),
    ]


def agree(
    args: list[Any], sequence_starts: Tensor | None, real: Tensor | None, tuning: SelectiveScanTuning
) -> None:
    dtype, before = args[6].dtype, args[8].clone()
    y, h = selective_scan(SelectiveScanArguments(*args, 32, sequence_starts, real), tuning=tuning)
    truth, last = torch_scan.selective_scan(
        SelectiveScanArguments(*doubles(*args), 32, sequence_starts, real)
    )
    assert torch.equal(args[8], before)
    assert_rounded_once(y, truth, dtype, RECURRENT)
    assert_rounded_once(h, last, torch.float32, RECURRENT)


@every_dtype
@settings(max_examples=12, deadline=None)
@given(
    L=st.sampled_from([1, 2, 7, 8, 33]),
    shape=st.sampled_from([(6, 5), (64, 16), (3, 64), (70, 1), (32, 32)]),
    tokens=st.sampled_from([1, 4, 8]),
    chunks=st.integers(1, 9),
    kind=st.sampled_from(["packed", "padded", "whole"]),
    seed=st.integers(0, 2**31),
)
def test_any_cut(
    dtype: torch.dtype, L: int, shape: tuple[int, int], tokens: int, chunks: int, kind: str, seed: int
) -> None:
    args = arguments(dtype, L, *shape, seed)
    sequence_starts = random_starts(seed, 2, L) if kind == "packed" else None
    real = None
    if kind == "padded":
        real = torch.ones(2, L, dtype=torch.bool, device=DEVICE)
        real[0, : L // 3 + 1] = False
    channels = 32
    programs = chunks * 2 * -(-shape[0] // channels)
    agree(args, sequence_starts, real, SelectiveScanTuning(channels, tokens, 1, programs, least=1))


def test_chunks_as_the_device_is_filled() -> None:
    """The default cuts few channels of a long text, and fewer pieces the more rows there are."""
    tuning = SelectiveScanTuning(channels=32, programs=2048, least=64, most=1024)
    assert tuning.chunk(1, 2048, 1536) == 64
    assert tuning.chunk(4, 2048, 5120) == 512
    assert tuning.chunk(64, 2048, 5120) == 1024
    assert tuning.chunk(1, 1, 5120) == 64
    agree(arguments(torch.float32, 70, 6, 16, 0), None, None, SelectiveScanTuning())


def test_wide_inputs_and_a_narrow_gate() -> None:
    """As Mamba's mixer calls it in 16 bits: the convolution's output is wide."""
    if not torch.cuda.is_available():
        pytest.skip("the interpreter cuts 16-bit results off instead of rounding them")
    args = arguments(torch.bfloat16, 50, 40, 16, 3)
    args[0] = args[0].float()
    agree(args, None, None, SelectiveScanTuning())


@pytest.mark.parametrize("at", [1, 20])
def test_in_pieces(at: int) -> None:
    args = arguments(torch.float32, 40, 20, 16, 1)
    y, h = selective_scan(SelectiveScanArguments(*args, 32, None, None))
    first = [v[:, :at] if i in BY_TOKEN else v for i, v in enumerate(args)]
    second = [v[:, at:] if i in BY_TOKEN else v for i, v in enumerate(args)]
    begun, second[8] = selective_scan(SelectiveScanArguments(*first, 32, None, None))
    rest, last = selective_scan(SelectiveScanArguments(*second, 32, None, None))
    assert relative_error(torch.cat([begun, rest], dim=1).cpu(), y.cpu()) <= RECURRENT
    assert relative_error(last.cpu(), h.cpu()) <= RECURRENT


def test_padding_leaves_the_state() -> None:
    args = arguments(torch.float32, 8, 6, 16, 2)
    real = torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)
    assert torch.equal(selective_scan(SelectiveScanArguments(*args, 32, None, real))[1], args[8])


def test_small_steps_keep_their_digits() -> None:
    args = arguments(torch.float32, 40, 6, 16, 4)
    args[7] = args[7] - 12
    agree(args, None, None, SelectiveScanTuning())


def test_the_backend_has_it_and_refuses_float64() -> None:
    assert TRITON.selective_scan.kernel is selective_scan
    with pytest.raises(BackendError, match="float64"):
        selective_scan(
            SelectiveScanArguments(*doubles(*arguments(torch.float32, 4, 6, 5, 0)), 32, None, None)
        )
