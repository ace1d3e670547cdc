"""Where the tests of Triton kernels run: on a GPU, else in Triton's interpreter, which make test installs."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needs_triton() -> None:
    """Skip the module that calls this while it is imported, where Triton is missing; in CI it must not be."""
    if importlib.util.find_spec("triton") is None:
        if os.environ.get("CI"):
            raise ImportError("Triton is missing, and in CI it must not be (make test installs it)")
        pytest.skip("Triton is not installed (make test installs it)", allow_module_level=True)
