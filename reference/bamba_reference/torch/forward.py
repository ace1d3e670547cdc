"""What a model of the family computes, in torch: the same definition as ``model``, batched, on any device.

Structure, names and formulas are those of ``model``. Activations and weights have the model's dtype; what ``torch.ops``
calls wide is float32 at least: logits, and the residual stream where ``residual_in_fp32`` is set.

In 16-bit dtypes transformers 5.23 rounds more often: each norm before its weight, the stream before a norm,
sums and activations of convolutions, dt and its bias before softplus, the selective scan's state before every
product with C, the router's logits, and all logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bamba_reference.config import Block, Config
from bamba_reference.model import rotary_angles
from bamba_reference.packing import Bools, InputError, Layout, check_tokens, layout
from bamba_reference.runtime.workers import Workers
from bamba_reference.tensors import (
    EMBEDDING,
    FINAL_NORM,
    NORMS,
    WIDE,
    check_names,
    check_shape,
    head_name,
    layer_prefix,
    tensor_shapes,
)
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.blocks import BLOCKS, BatchTokens, LayerWeights, Model, activated
from bamba_reference.torch.ops import wide
from bamba_reference.torch.state import LayerState, State

__all__ = [
    "BatchTokens",
    "Model",
    "Output",
    "default_chunk",
    "embed",
    "final_norm",
    "forward",
    "head",
    "layer",
    "load",
    "logits_of",
    "new_state",
    "prepare",
    "stored_dtype",
    "stream_of",
    "to_tensor",
]

# A batch of so many tokens is divided among a CPU's threads by its rows.
_MANY_TOKENS = 1024


@dataclass(frozen=True)
class Output:
    """The result of a pass: ``logits`` (B, kept, V), float32 at least.

    ``hidden_states``, each (B, L, d), are those before every layer and after the last; ``last_hidden`` is the last of
    them after the final norm, the input of the head.
    """

    logits: Tensor
    last_hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None


def default_chunk(device: torch.device) -> int:
    """32 on a CPU, where it was the fastest measured; 64 elsewhere, for fewer and larger operations."""
    return 32 if device.type == "cpu" else 64


def load(
    config: Config,
    weights: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: Backend = TORCH,
    chunk: int | None = None,
) -> Model:
    """A model from weights by the names in ``tensors``, converted to their dtypes and moved to one device.

    They may be numpy arrays or tensors of any float dtype. Raises ``TensorError`` where they do not fit the
    configuration. Tensors that need no conversion are shared, not copied, so that gradients reach them.
    """
    check_names(config, weights)
    device = torch.device(device)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensors[name] = to_tensor(weights[name], stored_dtype(name, dtype), device)
        check_shape(name, tensors[name].shape, shape)
    return Model(config, backend.arrange(tensors), dtype, device, backend, chunk or default_chunk(device))


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of ``dtype`` holds a tensor: wide for tensors that are used in wide arithmetic only.

    These are the norms, the convolution, dt's bias, A_log and D, and the router.
    """
    return wide(dtype) if name.endswith(WIDE) else dtype


def to_tensor(array: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from a tensor or a numpy array, whose dtype may be one of ``ml_dtypes``' (bfloat16, …)."""
    if isinstance(array, Tensor):
        return array.to(device=device, dtype=dtype)
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.kind == "V" or not hasattr(np, array.dtype.name):
        raw = torch.from_numpy(array.view(np.dtype(f"u{array.dtype.itemsize}")))
        return raw.view(getattr(torch, array.dtype.name)).to(device=device, dtype=dtype)
    return torch.from_numpy(array).to(device=device, dtype=dtype)


def forward(
    model: Model,
    tokens: Any,
    *,
    state: State | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
    logits_to_keep: int | Tensor = 0,
    hidden_states: bool = False,
) -> Output:
    """Run tokens (B, L) of integers through the model.

    ``state`` (``new_state``) is read and updated, so that a prompt may be run in pieces and decoding
    continue from it. ``attention_mask`` (1 for tokens) allows padding on the left; ``position_ids``,
    ``seq_idx`` and ``cu_seq_lens`` describe packed sequences: ``packing.layout`` has the shapes.
    ``logits_to_keep`` is a number of last tokens, 0 for all, or a tensor of positions. Raises ``InputError``
    for what cannot be run.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if ids.dim() != 2:
        raise InputError("tokens are not a batch", found=f"shape {tuple(ids.shape)}", expected="shape (B, L)")
    check_tokens(ids.cpu().numpy(), model.config.vocab_size)
    B, L = ids.shape
    if state is not None:
        state.check(B)
    where = layout(
        (B, L),
        past=state.length if state else 0,
        padding=state.padding if state else None,
        attention_mask=_host(attention_mask),
        position_ids=_host(position_ids),
        seq_idx=_host(seq_idx),
        cu_seq_lens=_host(cu_seq_lens),
    )
    ids = ids.to(model.device)

    def through(rows: slice) -> list[Tensor]:
        sequences = prepare(model.config, where.of_rows(rows), model.dtype, model.device)
        sequences = replace(sequences, first_text=rows.start or 0)
        trace = [embed(model, ids[rows])]  # (rows, L, d)
        for i in range(model.config.num_hidden_layers):
            x = layer(model, i, trace[-1], sequences, state.layers[i] if state else None)
            trace = [*trace, x] if hidden_states else [x]
        return trace

    with Workers(model.device, B if state is None and _divides(model, ids) else 1) as workers:
        borders = [B * i // workers.count for i in range(workers.count + 1)]
        pieces = [slice(*border) for border in pairwise(borders)]
        traces = list(workers.map(through, pieces)) if len(pieces) > 1 else [through(slice(None))]
    trace = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*traces, strict=True)]
    if state is not None:
        state.length, state.padding = state.length + L, where.padding
    last = final_norm(model, trace[-1])
    kept = last[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else last[:, logits_to_keep]
    if not kept.shape[1]:  # no position's logits are wanted
        none = kept.new_empty((*kept.shape[:-1], model.config.vocab_size), dtype=wide(kept.dtype))
        return Output(none, last, tuple(trace) if hidden_states else None)
    return Output(head(model, kept), last, tuple(trace) if hidden_states else None)


def _divides(model: Model, ids: Tensor) -> bool:
    """Whether threads are to run rows of their own: faster than sharing every operation, and without gradients."""
    gradients = torch.is_grad_enabled() and any(
        isinstance(weight, Tensor) and weight.requires_grad for weight in model.weights.values()
    )
    return model.backend.parallel and not gradients and ids.numel() >= _MANY_TOKENS


def new_state(model: Model, batch: int) -> State:
    """The state of ``batch`` rows before their first token."""
    return State(model.config, batch, model.dtype, model.device)


def prepare(config: Config, where: Layout, dtype: torch.dtype, device: torch.device) -> BatchTokens:
    """Rotary factors and masks, once for all layers."""
    # Rows with the same positions, as without packing and padding, share one row of angles.
    same = (where.positions == where.positions[:1]).all()
    positions = where.positions[:1] if same else where.positions  # (B or 1, L)
    angles = torch.from_numpy(rotary_angles(config, positions))  # (B or 1, L, r/2)
    packed = None
    if where.sequence_starts is not None:
        packed = []
        for row, marks in enumerate(where.sequence_starts):
            borders = [*marks.nonzero()[0].tolist(), len(marks)]
            packed += [(row, start, stop) for start, stop in pairwise(borders)]
    return BatchTokens(
        cos=angles.cos().to(device, wide(dtype)),
        sin=angles.sin().to(device, wide(dtype)),
        sequence_starts=None if where.sequence_starts is None else _marks(where.sequence_starts, device),
        real=None if where.real is None else _marks(where.real, device),
        padding=torch.from_numpy(where.padding).to(device) if where.padding.any() else None,
        packed=packed,
    )


def layer(
    model: Model,
    index: int,
    x: Tensor,
    sequences: BatchTokens,
    state: LayerState | None = None,
) -> Tensor:
    """One layer on the stream x (B, L, d): its one or two steps, each added to it."""
    config, ops, w = model.config, model.backend, LayerWeights(model, layer_prefix(index))
    steps, added = config.layers[index], config.residual_multiplier
    # Fused operations add without a multiplier, in the model's dtype.
    plain = added == 1 and not config.residual_in_fp32

    def norm(name: str) -> Tensor:
        return ops.rms_norm(x, w[name], config.rms_norm_eps).to(model.dtype)  # (B, L, d)

    def sum_of(blocks: tuple[Block, ...], u: Tensor) -> Tensor:
        first, *others = (
            BLOCKS[block](model, w, u, sequences, state.get(block) if state else None) for block in blocks
        )
        return sum(others, first).to(u.dtype)

    y = sum_of(steps.blocks, norm(NORMS[0]))
    if not steps.feed_forward:
        return torch.add(x, y, alpha=added)
    if plain and ops.add_norm is not None:
        x, u = ops.add_norm(x, y, w[NORMS[1]], config.rms_norm_eps)
    else:
        x = torch.add(x, y, alpha=added)
        u = norm(NORMS[1])
    if plain and ops.add_linear is not None and steps.feed_forward == ("mlp",):
        down = w.matrix("feed_forward.down_proj")
        return ops.add_linear(x, activated(model, w, u), *down, config.mlp_multipliers[1])
    return torch.add(x, sum_of(steps.feed_forward, u), alpha=added)


def embed(model: Model, ids: Tensor) -> Tensor:
    """The stream (B, L, d) before the first layer, of ids (B, L) on the model's device."""
    return stream_of(model.config, model.backend.embedding(ids, model.weights[EMBEDDING]))


def stream_of(config: Config, embedded: Tensor) -> Tensor:
    """The residual stream before the first layer, from rows of the embedding, in any shape."""
    x = embedded if config.embedding_multiplier == 1 else embedded * config.embedding_multiplier
    return x.to(wide(x.dtype)) if config.residual_in_fp32 else x


def final_norm(model: Model, x: Tensor) -> Tensor:
    """The head's input, in the model's dtype, from the stream x (…, d) after the last layer."""
    return model.backend.rms_norm(x, model.weights[FINAL_NORM], model.config.rms_norm_eps).to(model.dtype)


def head(model: Model, x: Tensor) -> Tensor:
    """Logits (…, V), wide, of final hidden states x (…, d)."""
    name = head_name(model.config)
    return logits_of(model.config, model.backend.head(x, model.weights[name], name))


def logits_of(config: Config, products: Tensor) -> Tensor:
    """Logits from the head's products, in any shape."""
    return products if config.logits_scaling == 1 else products / config.logits_scaling


def _marks(marks: Bools, device: torch.device) -> Tensor:
    """(B, L), contiguous, as kernels read it; numpy's masks may be in Fortran order."""
    return torch.from_numpy(np.ascontiguousarray(marks)).to(device)


def _host(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
