"""Attention in torch; names, shapes and sources are those of ``mixers.attention``, with a batch B in front."""

from __future__ import annotations

import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.torch.mixers.base import BatchTokens, LayerWeights, Model, TorchMixer


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


def mix(
    model: Model, w: LayerWeights, u: Tensor, sequences: BatchTokens, state: AttentionState | None
) -> Tensor:
    config, ops = model.config, model.backend
    q, k, v = (
        w.linear(f"self_attn.{name}_proj", u).unflatten(-1, (-1, config.head_dim)) for name in "qkv"
    )  # (B, L, heads, E), (B, L, kv, E), (B, L, kv, E)
    if config.rotary_dim:
        q, k = (ops.rotary(x, sequences.cos, sequences.sin) for x in (q, k))
    if state is not None:
        k, v = state.append(k, v)  # (B, S, kv, E)
    y = ops.attention(
        q, k, v, config.attention_scale, sequences.padding, sequences.packed
    )  # (B, L, heads, E)
    return w.linear("self_attn.o_proj", y.flatten(2))


def empty(config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> AttentionState:
    """The state before the first token: room for none."""
    return AttentionState(
        torch.empty(batch, 0, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device)
    )


ATTENTION = TorchMixer(mix, empty)
