"""What every launch of a Triton kernel needs: block sizes, contiguous rows, a check of dtype and device."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from bamba_reference.runtime.triton_cache import name_errors
from bamba_reference.torch.backend import BackendError

# Triton reads this when a kernel is defined, so that later changes have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

name_errors()


def padded(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The next power of two, which a Triton block must be, between ``least`` and ``most``."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


def rows_apart(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(x: Tensor) -> None:
    """Raise ``BackendError`` for float64, because the kernels compute in float32, and for a GPU that is not current.

    Triton starts its kernels on torch's current GPU, wherever their inputs are.
    """
    if x.dtype == torch.float64:
        raise BackendError(
            "the Triton kernels compute in float32",
            found="float64",
            expected="float32, bfloat16 or float16",
            fix="use the torch backend for float64",
        )
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        raise BackendError(
            "Triton starts its kernels on torch's current GPU",
            found=f"a tensor on {x.device}, and cuda:{torch.cuda.current_device()} is the current one",
            fix=f"call torch.cuda.set_device({x.get_device()}) before, or run it all within torch.cuda.device(…)",
        )


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, Hopper and later)."""
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device)[0] >= 9)
