"""How a kernel meets its blocks: as in the numpy twin they run along the trailing axis, a thread a lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bamba_reference.runtime.triton_cache import name_errors

name_errors()

Encoder = Callable[["Blocks"], torch.Tensor]

WARPS = 4

ENCODERS: dict[str, Encoder] = {}


def encoder(name: str) -> Callable[[Encoder], Encoder]:
    """Make a function from ``Blocks`` to bytes (block_bytes, n_blocks) the twin of a format."""

    def register(function: Encoder) -> Encoder:
        ENCODERS[name] = function
        return function

    return register


class Blocks:
    """Rows of weights on a device, and what kernels ask of them.

    ``x`` is float32 (block_size, n_blocks); ``importance`` float32 (block_size, blocks of a row) or None.
    """

    def __init__(self, rows: torch.Tensor, importance: torch.Tensor | None, size: int) -> None:
        self.rows = rows
        self.per_row = rows.shape[1] // size
        self.x = rows.reshape(-1, size).t().contiguous()
        self.importance = None if importance is None else importance.reshape(-1, size).t().contiguous()

    @property
    def n(self) -> int:
        return int(self.x.shape[1])

    @property
    def weights(self) -> torch.Tensor:
        """The importance; where there is none, the weights themselves stand in, and kernels do not look."""
        return self.x if self.importance is None else self.importance

    def constants(self, *values: Any) -> torch.Tensor:
        """Numbers and numpy arrays on the device, one after the other, as float32."""
        return torch.from_numpy(np.hstack(values).astype(np.float32)).to(self.x.device)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty((*shape, self.n), dtype=torch.float32, device=self.x.device)

    def bytes(self, size: int) -> torch.Tensor:
        return torch.empty((size, self.n), dtype=torch.uint8, device=self.x.device)

    def launch(self, kernel: Any, *args: Any, groups: int = 1, **constants: Any) -> None:
        """One thread for each block, or for each of a block's groups; args end with the number of blocks."""
        _launch(kernel, self.n * groups, self.x.device, *args, self.n, **constants)


def launch(kernel: Any, n: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """One thread for each of n lanes; args end with n."""
    _launch(kernel, n, device, *args, n, **constants)


def _launch(kernel: Any, lanes: int, device: torch.device, *args: Any, **constants: Any) -> None:
    # Triton's interpreter, which stands in on a CPU, takes as long for one lane as for many.
    size = WARPS * 32 if device.type == "cuda" else 1 << (lanes - 1).bit_length()
    grid = (-(-lanes // size),)
    # Nothing fuses a product with a sum: ggml's bytes come from a processor that rounds both.
    kernel[grid](*args, LANES=size, num_warps=WARPS, enable_fp_fusion=False, **constants)
