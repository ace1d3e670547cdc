"""Decoding with every kernel of a step recorded once in a CUDA graph and replayed for each token.

Launching a step's kernels takes the CPU longer than running them takes the GPU; a graph is launched at once. For that
the step reads its token, its position and the layers' states at fixed addresses and updates them there.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bamba_reference.kernels import matmul
from bamba_reference.kernels.attention import decode_attention
from bamba_reference.kernels.convolution import conv_in_place
from bamba_reference.kernels.step import step as scan_step
from bamba_reference.model import rotary_angles
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.forward import BatchTokens, Model, Output, embed, final_norm, head, layer
from bamba_reference.torch.ops import wide
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments
from bamba_reference.torch.state import AttentionState, LayerState, MambaState, State

_PRODUCTS: dict[str, Any] = {
    "linear": matmul.linear,
    "add_linear": matmul.add_linear,
    "gate_up": matmul.gate_up,
    "head": matmul.head,
}


class _Keys(AttentionState):
    """Keys and values (B, room, kv, E) at fixed addresses; the position to write is on the device."""

    def __init__(self, empty: Tensor, position: Tensor) -> None:
        super().__init__(empty)
        self._buffers = (torch.zeros_like(empty), torch.zeros_like(empty))
        self._position = position

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer.index_copy_(1, self._position, new)
        return self._buffers

    def take(self, k: Tensor, v: Tensor) -> None:
        for buffer, old in zip(self._buffers, (k, v), strict=True):
            buffer[:, : old.shape[1]] = old


class Decoder:
    """Continues from a state token by token, up to ``room`` tokens in total.

    ``state`` is read when the decoder is made and not updated. Called with tokens (B, 1), it returns what
    ``torch.forward.forward`` returns with a state; the next call overwrites logits and hidden states. Without a GPU,
    where the kernels are interpreted, the step runs without a graph. Raises ``ValueError`` for a ``room`` smaller than
    the state, and ``BackendError`` as ``launch.check`` does.
    """

    def __init__(self, model: Model, state: State, room: int) -> None:
        device, B = model.device, state.batch
        if room < state.length:
            raise ValueError(f"room for {room} tokens, but the state already has {state.length}")
        self.room, self.length = room, state.length
        self._tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._padding = torch.from_numpy(state.padding).to(device)
        angles = torch.from_numpy(rotary_angles(model.config, np.arange(room)[None]))[0]  # (room, r/2)
        self._cos = angles.cos().to(device, wide(model.dtype))
        self._sin = angles.sin().to(device, wide(model.dtype))
        self._layers: list[LayerState] = [
            {block: self._fixed(kept, room) for block, kept in blocks.items()} for blocks in state.layers
        ]
        self._model = replace(model, backend=_in_place(model.backend, self._position, self._padding))
        self._graph: tuple[torch.cuda.CUDAGraph, Output] | None = None
        if device.type == "cuda":
            self._graph = self._recorded()
        for blocks, kept in zip(self._layers, state.layers, strict=True):
            for block, mine in blocks.items():
                given = kept[block]
                if isinstance(mine, _Keys) and isinstance(given, AttentionState):
                    mine.take(*given.filled())
                elif isinstance(mine, MambaState) and isinstance(given, MambaState):
                    mine.tail.copy_(given.tail)
                    mine.h.copy_(given.h)
        self._position.fill_(state.length)

    def __call__(self, tokens: Any) -> Output:
        """The next step's output for tokens (B, 1). Raises ``IndexError`` when ``room`` is used up."""
        if self.length >= self.room:
            raise IndexError(
                f"the decoder has room for {self.room} tokens and is full; make one with more room"
            )
        self._tokens.copy_(torch.as_tensor(tokens, dtype=torch.int64).view_as(self._tokens))
        self.length += 1
        if self._graph is None:
            return self._step()
        graph, out = self._graph
        graph.replay()
        return out

    def _fixed(self, state: MambaState | AttentionState, room: int) -> MambaState | AttentionState:
        if isinstance(state, MambaState):
            return MambaState(torch.zeros_like(state.tail), torch.zeros_like(state.h))
        k, _ = state.filled()
        return _Keys(k.new_empty(k.shape[0], room, *k.shape[2:]), self._position)

    def _step(self) -> Output:
        model = self._model
        positions = (self._position - self._padding).clamp(min=0)  # (B,)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]  # (B, 1, r/2)
        sequences = BatchTokens(cos, sin, sequence_starts=None, real=None, padding=None, packed=None)
        with torch.no_grad():
            x = embed(model, self._tokens)  # (B, 1, d)
            for i, state in enumerate(self._layers):
                x = layer(model, i, x, sequences, state)
            last = final_norm(model, x)
            out = Output(head(model, last), last, None)
        self._position += 1
        return out

    def _recorded(self) -> tuple[torch.cuda.CUDAGraph, Output]:
        """The step as a graph. The runs before recording compile the kernels; the states they leave are overwritten."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._position.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # graphs in reference cycles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._step()
        return graph, out


def _in_place(backend: Backend, position: Tensor, padding: Tensor) -> Backend:
    """The backend with operations for one token at ``position`` that update their arguments in place.

    It must not refer to the decoder: the garbage collector frees a graph in a cycle at any time, which CUDA forbids
    while another graph is recorded.
    """

    def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
        return scan_step(arguments, after=arguments.h)

    def selective_scan(arguments: SelectiveScanArguments) -> tuple[Tensor, Tensor]:
        y, after = backend.selective_scan(arguments)
        return y, arguments.h.copy_(after)

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *_: Any) -> Tensor:
        return decode_attention(q, k, v, scale, position, padding)

    # A step writes no weights. Functions that a caller has replaced stay.
    early: dict[str, Any] = {}
    for name, function in _PRODUCTS.items():
        given = getattr(backend, name)
        if getattr(given, "kernel", given) is function:
            early[name] = partial(function, settled=True)
    return replace(
        backend,
        conv=conv_in_place,
        scan=scan,
        selective_scan=selective_scan,
        attention=attention,
        next_tail=lambda tail, xBC: tail,
        **early,
    )
