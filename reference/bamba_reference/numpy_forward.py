"""What a model of the family computes, in numpy, one sequence at a time: the definition the faster paths are judged
by.

A layer has one or two steps; each adds to the stream the sum of the blocks (``mixers``) that read its norm. How the
parts are put together follows transformers' ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``,
``modeling_mamba2.py``, ``modeling_mamba.py`` and ``modeling_falcon_mamba.py``.

Shapes: L tokens, d hidden size, V vocabulary; the blocks have their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bamba_reference.config import Block, Config
from bamba_reference.mixers import MIXERS, Memory, Scan, Sequence
from bamba_reference.numpy_ops import Array, product, rms_norm
from bamba_reference.packing import InputError, check_tokens, layout
from bamba_reference.tensors import (
    EMBEDDING,
    FINAL_NORM,
    NORMS,
    check_names,
    check_shape,
    head_name,
    layer_prefix,
    layer_tensors,
    tensor_shapes,
)


@dataclass
class NumpyState:
    """What the tokens so far leave in each block of each layer."""

    blocks: dict[tuple[int, Block], Memory] = field(default_factory=dict)
    length: int = 0


@dataclass(frozen=True)
class NumpyOutput:
    """``logits`` (kept, V); ``hidden_states``, each (L, d): before every layer and after the last."""

    logits: Array
    hidden_states: tuple[Array, ...] | None


def forward(
    config: Config,
    weights: Mapping[str, Any],
    tokens: Any,
    *,
    dtype: npt.DTypeLike = np.float64,
    scan: Scan = "chunked",
    chunk: int = 32,
    state: NumpyState | None = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
    logits_to_keep: int = 0,
    hidden_states: bool = False,
) -> NumpyOutput:
    """Run tokens (L,) through the model in float32 or float64; logits come in that dtype too.

    ``weights`` maps the names in ``tensors`` to arrays of any float dtype numpy can convert; nothing is kept of
    it. ``scan`` and ``chunk`` choose how the recurrence is computed, not what. ``state`` is read and brought
    up to date. ``position_ids``, ``seq_idx``, ``cu_seq_lens`` describe packed sequences
    (``packing.layout``). ``logits_to_keep`` > 0 computes the logits of that many last tokens only. Raises
    ``TensorError`` for weights that do not fit the configuration and ``InputError`` for tokens or positions
    that cannot be run.
    """
    tokens = np.asarray(tokens, dtype=np.int64)  # (L,)
    if tokens.ndim != 1:
        raise InputError("tokens are not one sequence", found=f"shape {tokens.shape}", expected="shape (L,)")
    check_names(config, weights)
    check_tokens(tokens, config.vocab_size)
    L, past = len(tokens), state.length if state else 0
    where = layout((1, L), past=past, position_ids=position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens)
    fresh = None if where.fresh is None else where.fresh[0]
    sequence = Sequence(where.positions[0], fresh, scan, chunk)
    before = state.blocks if state else {}
    shapes = tensor_shapes(config)

    def read(name: str) -> Array:
        array = np.asarray(weights[name], dtype)
        check_shape(name, array.shape, shapes[name])
        return array

    eps, added = config.rms_norm_eps, config.residual_multiplier
    x = read(EMBEDDING)[tokens] * config.embedding_multiplier  # (L, d)
    trace = [x]
    for i, steps in enumerate(config.layers):
        w = {name: read(layer_prefix(i) + name) for name in layer_tensors(config, i)}
        for norm, blocks in zip(NORMS, steps, strict=True):
            if not blocks:
                continue
            u = rms_norm(x, w[norm], eps)  # (L, d)
            outputs = []  # (L, d) each
            for block in blocks:
                y, after = MIXERS[block].mix(config, w, u, before.get((i, block)), sequence)
                outputs.append(y)
                if state:
                    state.blocks[i, block] = after
            x = x + added * sum(outputs[1:], outputs[0])
        trace.append(x)
    if state:
        state.length = past + L
    x = rms_norm(x[-logits_to_keep:], read(FINAL_NORM), eps)
    logits = product(x, read(head_name(config))) / config.logits_scaling  # (kept, V)
    return NumpyOutput(logits=logits, hidden_states=tuple(trace) if hidden_states else None)
