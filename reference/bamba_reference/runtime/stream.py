"""Run a model larger than memory: all texts through layer i, for every weight set, before layer i + 1 is loaded.

Memory holds one layer's weights, the texts' hidden states for each weight set, and in the end some rows of the head
and the logits of a block of tokens; logits of a whole text never exist at once.

The last bits of a product depend on its shape. Chunks of a text go through layers and head in groups of
``together``, so that those of a part which begins at a multiple of it get the same bits as in the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.packing import InputError, Ints, check_tokens, layout
from bamba_reference.tensors import (
    EMBEDDING,
    FINAL_NORM,
    check_names,
    check_shape,
    head_name,
    layer_prefix,
    layer_tensors,
    tensor_shapes,
)
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.forward import (
    BatchTokens,
    Model,
    default_chunk,
    final_norm,
    layer,
    logits_of,
    prepare,
    stored_dtype,
    stream_of,
    to_tensor,
)
from bamba_reference.torch.ops import wide

# Tokens that go through a layer together, on a CPU and elsewhere, and whose logits exist together.
_LAYER_TOKENS = 1024
_LAYER_TOKENS_ON_GPU = 8192
_HEAD_TOKENS = 512
# Rows of the head that are converted together: a head of 128,256 rows is twice a layer.
_HEAD_ROWS = 8192


@dataclass(frozen=True)
class LayerPass:
    """One weight set's pass through one layer, reported while the layer is still loaded.

    ``before``: hidden states (watched, L, d) of the first texts before the layer; ``after``: those of all texts
    (n, L, d) after it, which the next layer overwrites.
    """

    layer: int
    source: int
    model: Model
    sequences: BatchTokens
    before: Tensor
    after: Tensor


def final_hidden(
    config: Config | Sequence[Config],
    sources: Sequence[Mapping[str, Any]],
    tokens: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: Backend | Sequence[Backend] = TORCH,
    chunk: int | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    on_pass: Callable[[LayerPass], None] | None = None,
    watched: int = 0,
) -> list[Tensor]:
    """The final hidden states (n, L, d), after the final norm, of n texts of L tokens under each weight set.

    Each of ``sources`` is a lazy mapping: reading a name loads that tensor, numpy's or torch's, and nothing
    of it is kept after its layer. ``config`` and ``backend`` are one for all or one for each; the
    configurations have the same number of layers.
    ``on_layer(done, layers)`` is called after each layer, ``on_pass`` after each weight set's pass through it, with
    the hidden states of the first ``watched`` texts before it. Raises ``TensorError`` for tensors that do not fit and
    ``InputError`` for tokens that cannot be run.
    """
    ids = np.asarray(tokens, np.int64)  # (n, L)
    if ids.ndim != 2:
        raise InputError("the texts are not a batch", found=f"shape {ids.shape}", expected="shape (n, L)")
    configs = [config] * len(sources) if isinstance(config, Config) else list(config)
    backends = [backend] * len(sources) if isinstance(backend, Backend) else list(backend)
    for each, source in zip(configs, sources, strict=True):
        check_tokens(ids, each.vocab_size)
        check_names(each, source)
    device = torch.device(device)
    with torch.no_grad():
        runs = [
            # All rows share one row of positions: texts begin at 0 and have no padding.
            (
                each,
                ops,
                source,
                _embed(each, source, ids, dtype, device),
                prepare(each, layout((1, ids.shape[1])), dtype, device),
            )
            for each, ops, source in zip(configs, backends, sources, strict=True)
        ]
        rows = _rows(ids.shape[1], device)
        layers = configs[0].num_hidden_layers if configs else 0
        for i in range(layers):
            for number, (each, ops, source, x, sequences) in enumerate(runs):
                names = [layer_prefix(i) + name for name in layer_tensors(each, i)]
                model = _part(each, source, names, dtype, device, ops, chunk)
                before = x[:watched].clone()
                for some in x.split(rows):
                    some.copy_(layer(model, i, some, sequences))
                if on_pass:
                    on_pass(LayerPass(i, number, model, sequences, before, x))
                del model
            if on_layer:
                on_layer(i + 1, layers)
        for each, ops, source, x, _ in runs:
            model = _part(each, source, [FINAL_NORM], dtype, device, ops, chunk)
            for some in x.split(rows):
                some.copy_(final_norm(model, some))
    return [x.to(dtype) for _, _, _, x, _ in runs]


def logit_blocks(
    config: Config,
    source: Mapping[str, Any],
    hidden: Tensor,
    *,
    backend: Backend = TORCH,
    block: int | Sequence[int] = _HEAD_TOKENS,
) -> Iterator[Tensor]:
    """Logits (at most ``block``, V), wide, for final hidden states (T, d), block after block of tokens.

    ``block`` is the most tokens of one, or the tokens of each, such as ``head_blocks`` gives. On a GPU the head is
    read once and stays there until the last block.
    """
    name = head_name(config)
    check_shape(name, source[name].shape, tensor_shapes(config)[name])
    kept = None if hidden.device.type == "cpu" else to_tensor(source[name][:], hidden.dtype, hidden.device)
    for some in hidden.split(block if isinstance(block, int) else list(block)):
        with torch.no_grad():  # around the products, because the caller runs between the blocks
            logits = some.new_empty((len(some), config.vocab_size), dtype=wide(some.dtype))
            for start in range(0, config.vocab_size, _HEAD_ROWS):
                # On a CPU read again each time, so that a table mapped from a file is freed with its rows.
                rows = (source[name] if kept is None else kept)[start : start + _HEAD_ROWS]
                part = backend.head(some, to_tensor(rows, some.dtype, some.device), name)
                logits[:, start : start + _HEAD_ROWS] = logits_of(config, part)
        yield logits


def together(ctx: int, device: str | torch.device = "cpu", most: int = _HEAD_TOKENS) -> int:
    """The smallest number of chunks of ``ctx`` tokens by which a text may be split; see ``head_blocks``."""
    rows = _rows(ctx, device)
    return rows * max(1, most // (ctx - 1 - ctx // 2) // rows)


def head_blocks(
    chunks: int, ctx: int, device: str | torch.device = "cpu", most: int = _HEAD_TOKENS
) -> list[int]:
    """Lengths, ``most`` at most, of the blocks in which ``chunks`` chunks' second halves go through the head.

    The ``ctx - 1 - ctx // 2`` tokens of each are cut into blocks separately for every ``together`` chunks.
    """
    step, scored, blocks = together(ctx, device, most), ctx - 1 - ctx // 2, []
    for start in range(0, chunks, step):
        tokens = scored * min(step, chunks - start)
        blocks += [min(most, tokens - at) for at in range(0, tokens, most)]
    return blocks


def _rows(ctx: int, device: str | torch.device) -> int:
    """Texts of ``ctx`` tokens that go through a layer together."""
    on_cpu = torch.device(device).type == "cpu"
    return max(1, (_LAYER_TOKENS if on_cpu else _LAYER_TOKENS_ON_GPU) // ctx)


def _part(
    config: Config,
    source: Mapping[str, Any],
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    chunk: int | None,
) -> Model:
    """A model of which only these tensors are loaded."""
    shapes, weights = tensor_shapes(config), {}
    for name in names:
        weights[name] = to_tensor(source[name], stored_dtype(name, dtype), device)
        check_shape(name, weights[name].shape, shapes[name])
    return Model(config, backend.arrange(weights), dtype, device, backend, chunk or default_chunk(device))


def _embed(
    config: Config, source: Mapping[str, Any], ids: Ints, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Hidden states (n, L, d) before the first layer; only the rows that occur are converted."""
    table = source[EMBEDDING]
    check_shape(EMBEDDING, table.shape, tensor_shapes(config)[EMBEDDING])
    used, places = np.unique(ids, return_inverse=True)
    rows = table[torch.from_numpy(used)] if isinstance(table, Tensor) else table[used]
    return stream_of(config, to_tensor(rows, dtype, device))[
        torch.from_numpy(places.reshape(ids.shape)).to(device)
    ]
