"""The choice of a backend of the torch forward pass by its name."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from bamba_reference.errors import did_you_mean
from bamba_reference.torch.backend import TORCH, Backend, BackendError

if TYPE_CHECKING:
    import torch

# "numpy" is not among them: it is a forward pass of its own (``model``).
NAMES = ("auto", "torch", "numba", "triton", "mamba-ssm")


# Operations of a pass over a text, for which numba's kernels save less time than compiling them once takes.
_SMALL_WORK = 2e11


def backend_named(
    name: str, device: torch.device, dtype: torch.dtype, *, work: float | None = None
) -> Backend:
    """The backend of this name, for a device and a model's dtype.

    "auto" is "triton" on a CUDA device where Triton is installed and the kernels support the dtype, "numba" on a CPU
    in float32, unless ``work``, the operations of a pass over the text, is small; else "torch". Results are printed
    with the chosen backend's name. Raises ``BackendError`` for an unknown name, a missing package, and a device or
    dtype that the backend does not support.
    """
    if name == "auto":
        small = work is not None and work < _SMALL_WORK and device.type == "cpu"
        name = "torch" if small else _suitable(device, str(dtype))
    if name == "torch":
        return TORCH
    if name == "numpy":
        raise BackendError(
            "numpy's forward pass is a definition of its own, for perplexity only",
            found=name,
            expected=", ".join(NAMES),
        )
    if name not in NAMES:
        expected = ", ".join(NAMES) + "; for perplexity also numpy"
        raise BackendError(f"unknown backend{did_you_mean(name, NAMES)}", found=name, expected=expected)
    if name == "numba":
        _check_cpu(device, str(dtype))
        from bamba_reference.kernels.cpu.backend import NUMBA

        return NUMBA
    _check(name, device, dtype)
    if name == "mamba-ssm":
        from bamba_reference.kernels.mamba_ssm import backend as mamba_ssm_backend

        return mamba_ssm_backend()
    from bamba_reference.kernels.backend import TRITON

    return TRITON


def differentiable(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for gradients of a model: "auto" on a GPU, and torch on a CPU, whose kernels have none."""
    return TORCH if device.type == "cpu" else backend_named("auto", device, dtype)


def _suitable(device: torch.device, dtype: str) -> str:
    if device.type == "cuda" and dtype != "torch.float64" and _installed("triton"):
        return "triton"
    return "numba" if device.type == "cpu" and dtype == "torch.float32" else "torch"


def _check_cpu(device: torch.device, dtype: str) -> None:
    if device.type != "cpu" or dtype != "torch.float32":
        raise BackendError(
            "the backend numba computes in float32 on a CPU",
            found=f"{dtype.removeprefix('torch.')} on device {device}",
            expected="float32 on device cpu",
            fix="take --backend torch for another dtype, and --backend auto for another device",
        )


def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"the backend {name} runs on a GPU",
            found=f"device {device}",
            expected="cuda",
            fix="give --device cuda, or take --backend torch",
        )
    if not _installed("triton"):
        raise BackendError(
            f"the backend {name} needs Triton",
            fix="pip install triton, of the version that torch names (its CUDA builds bring it along)",
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
