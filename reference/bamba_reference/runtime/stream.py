"""Run a model larger than memory: all texts through layer i, for every weight set, before layer i + 1 is loaded.

Memory holds one layer's weights (of small layers, those of a few weight sets), the texts' hidden states for each weight
set, and in the end some rows of the head and the logits of a block of tokens in each thread; logits of a whole text
never exist at once.

The last bits of a product depend on its shape. Chunks of a text go through layers and head in groups of
``together``, so that those of a part which begins at a multiple of it get the same bits as in the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.packing import InputError, Ints, check_tokens, layout
from bamba_reference.runtime.layer_passes import LayerPass, TextsRun, part, run_layer
from bamba_reference.runtime.workers import Workers
from bamba_reference.tensors import (
    EMBEDDING,
    FINAL_NORM,
    check_names,
    check_shape,
    head_name,
    tensor_shapes,
)
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.forward import (
    final_norm,
    logits_of,
    prepare,
    stream_of,
    to_tensor,
)
from bamba_reference.torch.ops import wide

# Tokens that go through a layer together, on a CPU and elsewhere, and whose logits exist together.
_LAYER_TOKENS = 1024
_LAYER_TOKENS_ON_GPU = 8192
_HEAD_TOKENS = 512
# Weights of a head that is kept as numbers.
_MOST_KEPT = 1 << 24
# Rows of the head that are converted together: a head of 128,256 rows is twice a layer.
_HEAD_ROWS = 8192


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
    first_text: int = 0,
) -> list[Tensor]:
    """The final hidden states (n, L, d), after the final norm, of n texts of L tokens under each weight set.

    Each of ``sources`` is a lazy mapping: reading a name loads that tensor, numpy's or torch's, and nothing
    of it is kept after its layer. ``config`` and ``backend`` are one for all or one for each; the
    configurations have the same number of layers.
    ``on_layer(done, layers)`` is called after each layer, ``on_pass`` after each weight set's pass through it, with
    the hidden states of the first ``watched`` texts before it. ``first_text`` is the number of the first text, on which
    stochastic rounding depends. Raises ``TensorError`` for tensors that do not fit and
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
    rows = rows_together(ids.shape[1], device)
    layers = configs[0].num_hidden_layers if configs else 0
    parallel = all(ops.parallel for ops in backends)
    with (
        torch.no_grad(),
        workers(len(ids), ids.shape[1], len(sources), device) if parallel else Workers(device, 1) as pool,
    ):
        runs = [
            # All rows share one row of positions: texts begin at 0 and have no padding.
            TextsRun(
                each,
                ops,
                source,
                _embed(each, source, ids, dtype, device),
                dtype,
                replace(prepare(each, layout((1, ids.shape[1])), dtype, device), first_text=first_text),
            )
            for each, ops, source in zip(configs, backends, sources, strict=True)
        ]
        for run in runs[1:]:
            same = (_computed(run.config, dtype), run.backend) == (_computed(configs[0], dtype), backends[0])
            if same and torch.equal(run.x, runs[0].x):
                run.x = runs[0].x
        for i in range(layers):
            run_layer(i, runs, rows, pool, watched, on_pass, chunk)
            if on_layer:
                on_layer(i + 1, layers)
        for number, run in enumerate(runs):
            if number and run.x is runs[0].x:
                run.x = run.x.clone()
        for run in runs:
            model = part(run, [FINAL_NORM], chunk)
            for some in run.x.split(rows):
                some.copy_(final_norm(model, some))
    return [run.x.to(dtype) for run in runs]


class Head:
    """Logits (T, V), wide, of final hidden states (T, d), for one weight set: blocks of tokens in any threads.

    On a GPU, and where it is small, the matrix is kept as numbers of ``dtype``; else its rows are read for each block.
    Raises ``TensorError`` where its shape is not the configuration's.
    """

    def __init__(
        self,
        config: Config,
        source: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        backend: Backend = TORCH,
    ) -> None:
        name = head_name(config)
        shape = source[name].shape
        check_shape(name, shape, tensor_shapes(config)[name])
        kept = torch.device(device).type != "cpu" or math.prod(shape) <= _MOST_KEPT
        self._kept = to_tensor(source[name][:], dtype, torch.device(device)) if kept else None
        self._config, self._backend, self._source, self._name = config, backend, source, name

    def __call__(self, hidden: Tensor) -> Tensor:
        config = self._config
        logits = hidden.new_empty((len(hidden), config.vocab_size), dtype=wide(hidden.dtype))
        with torch.no_grad():
            for start in range(0, config.vocab_size, _HEAD_ROWS):
                rows = self._source[self._name] if self._kept is None else self._kept
                some = to_tensor(rows[start : start + _HEAD_ROWS], hidden.dtype, hidden.device)
                part = self._backend.head(hidden, some, self._name)
                logits[:, start : start + _HEAD_ROWS] = logits_of(config, part)
        return logits


def workers(texts: int, ctx: int, sources: int, device: torch.device) -> Workers:
    """The threads that run texts through layers: of two weight sets at a time, since the next is read ahead."""
    return Workers(device, -(-texts // rows_together(ctx, device)) * min(2, sources))


def _computed(config: Config, dtype: torch.dtype) -> Config:
    """The configuration as layers use it: they add epsilon, which a GGUF stores in float32, to sums of that type."""
    return (
        config
        if dtype == torch.float64
        else replace(config, rms_norm_eps=float(np.float32(config.rms_norm_eps)))
    )


def together(ctx: int, device: str | torch.device = "cpu", most: int = _HEAD_TOKENS) -> int:
    """The smallest number of chunks of ``ctx`` tokens by which a text may be split; see ``head_blocks``."""
    rows = rows_together(ctx, device)
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


def rows_together(ctx: int, device: str | torch.device) -> int:
    """Texts of ``ctx`` tokens that go through a layer together."""
    on_cpu = torch.device(device).type == "cpu"
    return max(1, (_LAYER_TOKENS if on_cpu else _LAYER_TOKENS_ON_GPU) // ctx)


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
