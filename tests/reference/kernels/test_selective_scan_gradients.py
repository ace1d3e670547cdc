"""The gradients of Mamba's selective scan are those of the torch definition in float64, however tokens are cut up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bamba_reference.kernels.backend import TRITON
from bamba_reference.kernels.backward import selective_scan as backward
from bamba_reference.torch import scan as torch_scan
from bamba_reference.torch.scan import SelectiveScanArguments
from tests.reference.cases import relative_error
from tests.reference.kernels.test_gradients import agree
from tests.reference.kernels.test_operations import every_dtype
from tests.reference.kernels.test_selective_scan import arguments
from tests.reference.operations import random_starts
from tests.support.kernels import DEVICE

# A gradient is a sum over more terms than a result, and goes through twice as many operations.
BOUND = 2e-5


@every_dtype
@pytest.mark.parametrize(
    ("L", "shape", "tokens", "chunks", "kind"),
    [
        (1, (6, 5), 8, 1, "whole"),
        (7, (70, 16), 4, 1, "padded"),
        (16, (64, 16), 8, 9, "whole"),
        (33, (6, 5), 8, 9, "packed"),
        (33, (3, 64), 4, 3, "padded"),
    ],
)
def test_any_cut(
    dtype: torch.dtype,
    L: int,
    shape: tuple[int, int],
    tokens: int,
    chunks: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channels = 32
    programs = chunks * 2 * -(-shape[0] // channels)
    tuning = replace(backward.DEFAULT, channels=channels, tokens=tokens, programs=programs, least=1)
    monkeypatch.setitem(backward.gradients.__kwdefaults__, "tuning", tuning)
    sequence_starts = random_starts(L, 2, L) if kind == "packed" else None
    real = None
    if kind == "padded":
        real = torch.ones(2, L, dtype=torch.bool, device=DEVICE)
        real[0, : L // 3 + 1] = False

    def scan(operation: Any) -> Any:
        return lambda *v: operation(SelectiveScanArguments(*v, 32, sequence_starts, real))

    agree(
        scan(TRITON.selective_scan),
        scan(torch_scan.selective_scan),
        *arguments(dtype, L, *shape, L),
        besides=BOUND,
    )


def test_small_steps_keep_their_digits_and_either_result_may_be_unused() -> None:
    args = arguments(torch.float32, 20, 6, 16, 4)
    args[7] = args[7] - 12
    for used in (0, 1):
        found = []
        for operation, wide in (
            (TRITON.selective_scan, torch.float32),
            (torch_scan.selective_scan, torch.float64),
        ):
            leaves = [v.to(wide).requires_grad_() for v in args]
            result = operation(SelectiveScanArguments(*leaves, 32, None, None))[used]
            found.append(torch.autograd.grad(result.sin().sum(), leaves, materialize_grads=True))
        for mine, exact in zip(*found, strict=True):
            assert relative_error(mine.cpu(), exact.cpu()) <= BOUND or (not exact.any() and not mine.any())
