"""What the tokens run so far leave behind for the tokens to come, layer by layer.

A state is for inference: it holds values, and no gradient flows from one call into the next.
"""

from __future__ import annotations

import numpy as np
import torch

from bamba_reference.config import Block, Config
from bamba_reference.packing import InputError, Ints
from bamba_reference.torch.mixers import TORCH_MIXERS, AttentionState, MambaState

__all__ = ["AttentionState", "LayerState", "MambaState", "State"]

# The states of those blocks of a layer that keep one.
LayerState = dict[Block, MambaState | AttentionState]


class State:
    """The state of a batch of rows: empty at first, brought up to date by each pass it is given to."""

    def __init__(self, config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch = batch
        self.length = 0
        self.padding: Ints = np.zeros(batch, np.int64)
        self.layers: list[LayerState] = []
        for layer in config.layers:
            kinds = {block: TORCH_MIXERS[block].empty for block in (*layer.blocks, *layer.feed_forward)}
            self.layers.append(
                {block: empty(config, batch, dtype, device) for block, empty in kinds.items() if empty}
            )

    def check(self, batch: int) -> None:
        """Raise ``InputError`` unless a batch of this many rows can go on from here."""
        if batch != self.batch:
            raise InputError(
                "a state belongs to a batch of another size",
                found=f"{batch} rows",
                expected=f"{self.batch} rows",
                fix="begin a new state for a new batch",
            )
