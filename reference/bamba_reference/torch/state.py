"""What the tokens so far leave in a model for the next ones, block by block.

A state is for inference: it holds values, and no gradient flows from one call into the next.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bamba_reference.config import Block, Config
from bamba_reference.packing import InputError, Ints
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.ops import wide


class AttentionState:
    """Keys and values of all tokens so far, each (B, S, kv, E), in buffers that grow by doubling."""

    def __init__(self, empty: Tensor) -> None:
        self._buffers = (empty, empty)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, L, kv, E); return those of all tokens so far, as views."""
        start, self.length = self.length, self.length + k.shape[1]
        capacity = self._buffers[0].shape[1]
        if self.length > capacity:
            capacity = max(self.length, 2 * capacity)
            self._buffers = (
                self._grown(self._buffers[0], capacity, start),
                self._grown(self._buffers[1], capacity, start),
            )
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, start : self.length] = new.detach()
        return self.filled()

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far, as views."""
        return self._buffers[0][:, : self.length], self._buffers[1][:, : self.length]

    @property
    def n_bytes(self) -> int:
        return sum(each.nbytes for each in self._buffers)

    def select(self, rows: Tensor) -> AttentionState:
        """See ``State.select``."""
        k, v = (each.index_select(0, rows) for each in self.filled())
        chosen = AttentionState(k)
        chosen._buffers, chosen.length = (k, v), self.length
        return chosen

    @staticmethod
    def _grown(buffer: Tensor, capacity: int, used: int) -> Tensor:
        grown = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
        grown[:, :used] = buffer[:, :used]
        return grown


@dataclass
class MambaState:
    """``tail`` (B, K-1, channels): the last inputs of the convolution. ``h``: the recurrence's state, wide.

    h is (B, H, P, N) in Mamba-2 and (B, I, N) in Mamba.
    """

    tail: Tensor
    h: Tensor

    def update(self, ops: Backend, inputs: Tensor, h: Tensor) -> None:
        """Set the state after the tokens whose convolution read ``inputs`` (B, L, channels)."""
        self.tail, self.h = ops.next_tail(self.tail, inputs), h.detach()

    @property
    def n_bytes(self) -> int:
        return int(self.tail.nbytes + self.h.nbytes)

    def select(self, rows: Tensor) -> MambaState:
        """See ``State.select``."""
        return MambaState(self.tail.index_select(0, rows), self.h.index_select(0, rows))


# The states of those blocks of a layer that keep one.
LayerState = dict[Block, MambaState | AttentionState]


class State:
    """The state of a batch of rows: empty at first, updated by each pass it is given to."""

    def __init__(self, config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch = batch
        self._device = device
        self.length = 0
        self.padding: Ints = np.zeros(batch, np.int64)
        self.layers = [
            {
                block: _block_state(config, block, batch, dtype, device)
                for block in (*layer.blocks, *layer.feed_forward)
                if block not in ("mlp", "moe")
            }
            for layer in config.layers
        ]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.n_bytes for layer in self.layers for each in layer.values())

    def check(self, batch: int) -> None:
        """Raise ``InputError`` unless a batch has as many rows as this state."""
        if batch != self.batch:
            raise InputError(
                "a state belongs to a batch of another size",
                found=f"{batch} rows",
                expected=f"{self.batch} rows",
                fix="begin a new state for a new batch",
            )

    def select(self, rows: Sequence[int]) -> State:
        """A state of its own for each of these rows, in this order; a row may be named several times."""
        chosen, index = copy.copy(self), torch.tensor(rows, device=self._device)
        chosen.batch, chosen.padding = len(rows), self.padding[list(rows)]
        chosen.layers = [
            {block: each.select(index) for block, each in layer.items()} for layer in self.layers
        ]
        return chosen


def empty_mamba_state(
    config: Config, block: Block, batch: int, dtype: torch.dtype, device: torch.device
) -> MambaState:
    """The state of a Mamba-2 or Mamba block before the first token: zeros."""
    heads = (config.mamba_n_heads, config.mamba_d_head) if block == "mamba2" else (config.mamba_d_inner,)
    return MambaState(
        tail=torch.zeros(batch, config.mamba_d_conv - 1, config.mamba_conv_dim, dtype=dtype, device=device),
        h=torch.zeros(batch, *heads, config.mamba_d_state, dtype=wide(dtype), device=device),
    )


def _block_state(
    config: Config, block: Block, batch: int, dtype: torch.dtype, device: torch.device
) -> MambaState | AttentionState:
    if block != "attention":
        return empty_mamba_state(config, block, batch, dtype, device)
    shape = (batch, 0, config.num_key_value_heads, config.head_dim)
    return AttentionState(torch.empty(shape, dtype=dtype, device=device))
