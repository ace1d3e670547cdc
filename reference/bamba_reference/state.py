"""What the tokens run so far leave behind for the tokens to come, layer by layer.

A state is for inference: it holds values, and no gradient flows from one call into the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.packing import InputError, Ints
from bamba_reference.torch_ops import wide


@dataclass
class MambaState:
    """``tail`` (B, K-1, I+2GN): the last inputs of the convolution. ``h`` (B, H, P, N): float32 at least."""

    tail: Tensor
    h: Tensor


class AttentionState:
    """Keys and values of all tokens so far, each (B, S, kv, E), in buffers that grow by doubling."""

    def __init__(self, empty: Tensor) -> None:
        self._buffers = (empty, empty)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, L, kv, E); return those of all tokens so far, as views."""
        start, self.length = self.length, self.length + k.shape[1]
        room = self._buffers[0].shape[1]
        if self.length > room:
            room = max(self.length, 2 * room)
            self._buffers = (
                self._grown(self._buffers[0], room, start),
                self._grown(self._buffers[1], room, start),
            )
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, start : self.length] = new.detach()
        return self.filled()

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, as views."""
        return self._buffers[0][:, : self.length], self._buffers[1][:, : self.length]

    @staticmethod
    def _grown(buffer: Tensor, room: int, used: int) -> Tensor:
        grown = buffer.new_empty(buffer.shape[0], room, *buffer.shape[2:])
        grown[:, :used] = buffer[:, :used]
        return grown


class State:
    """The state of a batch of rows: empty at first, brought up to date by each pass it is given to."""

    def __init__(self, config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch = batch
        self.length = 0
        self.starts: Ints = np.zeros(batch, np.int64)
        self.layers: list[MambaState | AttentionState] = [
            empty_mamba(config, batch, dtype, device)
            if kind == "mamba"
            else AttentionState(
                torch.empty(batch, 0, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device)
            )
            for kind in config.layer_types
        ]

    def check(self, batch: int) -> None:
        """Raise ``InputError`` unless a batch of this many rows can go on from here."""
        if batch != self.batch:
            raise InputError(
                "a state belongs to a batch of another size",
                found=f"{batch} rows",
                expected=f"{self.batch} rows",
                fix="begin a new state for a new batch",
            )


def empty_mamba(config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> MambaState:
    """The state before the first token: nothing convolved, nothing remembered."""
    return MambaState(
        tail=torch.zeros(batch, config.mamba_d_conv - 1, config.mamba_conv_dim, dtype=dtype, device=device),
        h=torch.zeros(
            batch,
            config.mamba_n_heads,
            config.mamba_d_head,
            config.mamba_d_state,
            dtype=wide(dtype),
            device=device,
        ),
    )
