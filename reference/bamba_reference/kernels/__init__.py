"""Triton kernels behind ``bamba_reference.backend.Backend``, and the choice of a backend by name."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from bamba_reference.backend import TORCH, Backend, BackendError

if TYPE_CHECKING:
    import torch

# numpy's is a forward pass of its own, chosen before there is a Backend.
NAMES = ("auto", "torch", "triton", "mamba-ssm")


def backend_named(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend users call ``name`` for a device and a model's dtype.

    "auto" is "triton" on a CUDA device that has Triton and for a dtype the kernels take, else "torch"; whoever
    shows a result shows the name of what came out. Raises ``BackendError`` for a name that is none, for a
    package that is missing, and for a device or dtype the backend does not run on.
    """
    if name == "auto":
        suits = device.type == "cuda" and str(dtype) != "torch.float64" and _installed("triton")
        name = "triton" if suits else "torch"
    if name == "torch":
        return TORCH
    if name not in NAMES:
        raise BackendError("no such backend", found=name, expected=", ".join(("numpy", *NAMES)))
    _check(name, device, dtype)
    if name == "mamba-ssm":
        from bamba_reference.kernels.mamba_ssm import backend as mamba_ssm_backend

        return mamba_ssm_backend()
    from bamba_reference.kernels.backend import TRITON

    return TRITON


def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if not _installed("triton"):
        raise BackendError(
            f"the backend {name} needs Triton",
            fix="pip install triton, of the version that torch names (its CUDA builds bring it along)",
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"the backend {name} runs on a GPU",
            found=f"device {device}",
            expected="cuda",
            fix="give --device cuda, or take --backend torch",
        )
    if str(dtype) == "torch.float64":
        raise BackendError(
            f"the backend {name} computes in float32 at most",
            found="float64",
            expected="float32, bfloat16 or float16",
            fix="take --backend torch for float64",
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
