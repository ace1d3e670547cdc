"""What every kernel's launch needs: block sizes, views with neighbouring last elements, dtypes it may be given."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from bamba_reference.runtime.triton_cache import name_errors
from bamba_reference.torch.backend import BackendError

# Read by Triton when a kernel is defined, so it does not change after this module's siblings are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

name_errors()


def padded(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """The next power of two, in which Triton's blocks come, between ``least`` and ``most``."""
    return min(most, max(least, 1 << (size - 1).bit_length()))


def rows_apart(x: Tensor) -> Tensor:
    """x itself where neighbours of the last dimension lie side by side, else a copy in which they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(x: Tensor) -> None:
    """What every kernel asks of its input.

    Raises ``BackendError`` for a dtype that the kernels, which compute in float32, would narrow, and on a GPU other
    than torch's current one, on which Triton starts its kernels wherever their inputs lie.
    """
    if x.dtype == torch.float64:
        raise BackendError(
            "the Triton kernels compute in float32",
            found="float64",
            expected="float32, bfloat16 or float16",
            fix="take the torch backend for float64",
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
