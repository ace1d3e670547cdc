"""The kernels run on a GPU where there is one, and elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels import DEVICE, needs_triton

needs_triton()


@pytest.fixture
def device() -> torch.device:
    return DEVICE
