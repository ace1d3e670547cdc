"""What a block is in torch, and its arguments: the model, one layer's tensors, and how tokens belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.torch.backend import Backend


@dataclass(frozen=True)
class Model:
    """A configuration with its weights as tensors by the names in ``tensors``, on one device.

    ``dtype`` is that of the matrices and of the activations; ``stored_dtype`` has each tensor's. ``chunk`` is
    the scan's, chosen for the device and not the checkpoint's: chunking is exact.
    """

    config: Config
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    chunk: int


@dataclass(frozen=True)
class BatchTokens:
    """A ``packing.Layout`` as the layers read it: tensors on the model's device."""

    cos: Tensor  # (B or 1, L, rotary_dim / 2), wide
    sin: Tensor
    sequence_starts: Tensor | None  # (B, L)
    real: Tensor | None  # (B, L)
    padding: Tensor | None  # (B,)
    packed: list[tuple[int, int, int]] | None  # (row, start, stop)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors by their names within it."""

    model: Model
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.model.weights[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self.model.weights.get(self.prefix + name)

    def given(self, name: str) -> tuple[Tensor, Tensor | None, str]:
        """The matrix ``name``, its bias if it has one, and the matrix's full name: a product's last arguments."""
        return self[f"{name}.weight"], self.get(f"{name}.bias"), f"{self.prefix}{name}.weight"

    def linear(self, name: str, x: Tensor, *, bias: bool = True) -> Tensor:
        """x (…, in) times the matrix ``name`` transposed, plus its bias if it has one and ``bias`` is left true."""
        weight, added, full_name = self.given(name)
        return self.model.backend.linear(x, weight, added if bias else None, full_name)


@dataclass
class MambaState:
    """``tail`` (B, K-1, channels): the last inputs of the convolution. ``h``: the recurrence's, float32 at least.

    Mamba-2's h is (B, H, P, N), Mamba's (B, I, N).
    """

    tail: Tensor
    h: Tensor

    def advance(self, ops: Backend, inputs: Tensor, h: Tensor) -> None:
        """Go on to the end of the tokens whose convolution read ``inputs`` (B, L, channels)."""
        self.tail, self.h = ops.next_tail(self.tail, inputs), h.detach()


@dataclass(frozen=True)
class TorchMixer:
    """A kind of block, the same as in ``mixers`` but batched.

    ``mix`` takes the model, the layer's tensors, the normed hidden states u (B, L, d) in the model's dtype, the
    sequences and the block's state, none for tokens that nothing precedes and nothing follows; it returns what is
    added to the stream, (B, L, d), in the model's dtype or wider, and brings the state up to date. ``empty`` makes
    the state before the first token for a batch in a dtype on a device; a block without it keeps no state.
    """

    mix: Callable[[Model, LayerWeights, Tensor, BatchTokens, Any], Tensor]
    empty: Callable[[Config, int, torch.dtype, torch.device], Any] | None = None
