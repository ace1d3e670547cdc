"""The kernels run on a GPU where there is one, and elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
if importlib.util.find_spec("triton") is None:
    if os.environ.get("CI"):
        raise ImportError("Triton is missing, and in CI it must not be (make test installs it)")
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
