"""The backend calls mamba_ssm and causal_conv1d as they document: torch versions of their functions are called instead.

The packages themselves need a GPU: ``benchmarks/forward_cuda.py`` compares their results with float32 there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bamba_reference.kernels.mamba_ssm import backend
from bamba_reference.torch import ops as torch_ops
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.backend import Backend, BackendError
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments
from tests.reference.cases import relative_error
from tests.reference.kernels import packages as written
from tests.reference.operations import EXACT


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Backend:
    def stand_in(name: str, **functions: Callable[..., Any]) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        stand_in(name)
    stand_in("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=written.selective_scan_fn)
    stand_in("mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=written.rmsnorm_fn)
    stand_in(
        "mamba_ssm.ops.triton.selective_state_update", selective_state_update=written.selective_state_update
    )
    stand_in("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=written.mamba_chunk_scan_combined)
    stand_in("causal_conv1d", causal_conv1d_fn=written.causal_conv1d_fn)
    return backend()


def convolution(channels: int = 16, taps: int = 4) -> list[Any]:
    """xBC as a part of a projection (2, 9, W), weight, bias and tail."""
    random = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 9, channels + 24, generator=random)
    return [
        projected[..., 8 : channels + 8],
        torch.randn(channels, taps, generator=random),
        torch.randn(channels, generator=random),
        torch.randn(2, taps - 1, channels, generator=random),
    ]


def sequence_starts(*starts: int) -> Tensor:
    marks = torch.zeros(2, 9, dtype=torch.bool)
    marks[:, list(starts)] = True
    return marks


@pytest.mark.parametrize("marks", [None, sequence_starts(0, 3, 8)], ids=["goes on", "packed"])
@pytest.mark.parametrize("taps", [2, 4])
def test_convolution(taps: int, marks: Tensor | None, packages: Backend) -> None:
    args = convolution(taps=taps)
    if marks is not None:
        args[3] = torch.zeros_like(args[3])
    assert relative_error(packages.conv(*args, marks), torch_ops.conv(*args, marks)) <= EXACT
    args[2] = None
    assert relative_error(packages.conv(*args, marks), torch_ops.conv(*args, marks)) <= EXACT


@pytest.mark.parametrize("shape", [(12, 4), (16, 5)])
def test_convolutions_there_are_not(shape: tuple[int, int], packages: Backend) -> None:
    with pytest.raises(BackendError, match=f"{shape[0]} channels, {shape[1]} taps"):
        packages.conv(*convolution(*shape), None)


def mamba2_arguments(L: int, limit: tuple[float, float] = (0.0, float("inf"))) -> list[Any]:
    """Arguments of Mamba-2's scan: two rows of L tokens, 4 heads of 3 in 2 groups, 5 states, 32 for a chunk."""
    random = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, dt, B, C = normal(2, L, 4, 3), normal(2, L, 4), normal(2, L, 2, 5), normal(2, L, 2, 5)
    return [x, dt, normal(4), B, C, normal(4), normal(4), limit, normal(2, 4, 3, 5), 32]


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.0, 0.5)])
def test_scan(limit: tuple[float, float], kind: str, packages: Backend) -> None:
    args, marks, real = mamba2_arguments(9, limit), None, None
    if kind == "packed":
        marks = sequence_starts(0, 3, 8)
    if kind == "padded":
        real = torch.ones(2, 9, dtype=torch.bool)
        real[1, :5] = False
    found, expected = (
        packages.scan(ScanArguments(*args, marks, real)),
        torch_scan.scan(ScanArguments(*args, marks, real)),
    )
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) <= EXACT


def test_a_lower_limit_leaves_no_way_to_skip_padding(packages: Backend) -> None:
    real = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(BackendError, match="lower limit"):
        packages.scan(ScanArguments(*mamba2_arguments(9, (0.1, 1.0)), None, real))
    args = mamba2_arguments(9, (0.1, 1.0))
    found, expected = (
        packages.scan(ScanArguments(*args, None, None)),
        torch_scan.scan(ScanArguments(*args, None, None)),
    )
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) <= EXACT


@pytest.mark.parametrize("groups", [1, 4])
def test_gated_norm(groups: int, packages: Backend) -> None:
    random = torch.Generator().manual_seed(groups)
    y, z = torch.randn(2, 2, 5, 24, generator=random)
    weight = torch.randn(24, generator=random)
    found = packages.gated_norm(y, z, weight, groups, 1e-5)
    assert relative_error(found, torch_ops.gated_norm(y, z, weight, groups, 1e-5)) <= EXACT


def scan_arguments(L: int) -> list[Any]:
    """Arguments of Mamba's scan: two rows of L tokens, 6 channels of 5 states, chunk 32."""
    random = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, dt, z, B, C = normal(2, L, 6), normal(2, L, 6), normal(2, L, 6), normal(2, L, 5), normal(2, L, 5)
    return [x, dt, normal(6, 5), B, C, normal(6), z, normal(6), torch.zeros(2, 6, 5), 32]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("L", [1, 7])
def test_selective_scan(L: int, padded: bool, packages: Backend) -> None:
    args, real = scan_arguments(L), None
    if padded:
        real = torch.ones(2, L, dtype=torch.bool)
        real[1, : (L + 1) // 2] = False
    found, expected = (
        packages.selective_scan(SelectiveScanArguments(*args, None, real)),
        torch_scan.selective_scan(SelectiveScanArguments(*args, None, real)),
    )
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) <= EXACT


@pytest.mark.parametrize("L", [1, 7])
@pytest.mark.parametrize("normed", [False, True])
def test_selective_scan_of_16_bits(L: int, normed: bool, packages: Backend) -> None:
    """As a mixer has them: x wide, and B and C too where a norm has made them."""
    args = scan_arguments(L)
    for i in (1, 6) if normed else (1, 3, 4, 6):
        args[i] = args[i].bfloat16()
    y, h = packages.selective_scan(SelectiveScanArguments(*args, None, None))
    truth = torch_scan.selective_scan(SelectiveScanArguments(*args, None, None))
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert relative_error(y, truth[0]) <= 0.02 and relative_error(h, truth[1]) <= 0.02


def test_a_selective_scan_of_one_token_goes_on(packages: Backend) -> None:
    args = scan_arguments(1)
    args[8] = before = torch.randn(2, 6, 5)
    kept = before.clone()
    found, expected = (
        packages.selective_scan(SelectiveScanArguments(*args, None, None)),
        torch_scan.selective_scan(SelectiveScanArguments(*args, None, None)),
    )
    assert torch.equal(before, kept)
    for ours, truth in zip(found, expected, strict=True):
        assert relative_error(ours, truth) <= EXACT


def test_selective_scans_there_are_not(packages: Backend) -> None:
    args = scan_arguments(9)
    with pytest.raises(BackendError, match="packed"):
        packages.selective_scan(SelectiveScanArguments(*args, sequence_starts(0, 4), None))
    args[8] = torch.ones(2, 6, 5)
    with pytest.raises(BackendError, match="before the first"):
        packages.selective_scan(SelectiveScanArguments(*args, None, None))


@pytest.mark.parametrize("missing", ["mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"])
def test_a_missing_package(missing: str, packages: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    package = missing.partition(".")[0]
    with pytest.raises(BackendError, match=package) as caught:
        backend()
    assert f"--no-build-isolation {package.replace('_', '-')}" in str(caught.value)
