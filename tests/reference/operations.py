"""Random arguments for tests of single operations, and the comparison with float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.cases import relative_error
from tests.support.kernels import DEVICE

EXACT = 1e-6  # relative error of float32 against float64
RECURRENT = 5e-6  # the same for recurrences, which add up errors
EPS = 1e-5  # of norms


def doubles(*values: Any) -> list[Any]:
    """The values, float tensors in float64."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def draw(seed: int, device: torch.device = DEVICE) -> Any:
    """A function of a shape that draws normal numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return normal


def random_starts(seed: int, B: int, L: int, device: torch.device = DEVICE) -> Tensor:
    """``sequence_starts`` (B, L); the first row begins with one, the others may continue the state."""
    starts = torch.rand((B, L), generator=torch.Generator().manual_seed(seed)) < 0.1
    starts[0, 0] = True
    return starts.to(device)


def assert_rounded_once(found: Tensor, truth: Tensor, dtype: torch.dtype, besides: float = EXACT) -> None:
    """``found`` is as close to the truth (float64) as the truth rounded to ``dtype``, up to ``besides``."""
    assert found.dtype == dtype
    once = relative_error(truth.to(dtype).cpu(), truth.cpu())
    assert relative_error(found.cpu(), truth.cpu()) <= 1.02 * once + besides
