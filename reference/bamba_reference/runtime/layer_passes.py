"""Texts through one layer after the other, under several weight sets that are compared; see ``stream``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.runtime.workers import Workers
from bamba_reference.tensors import check_shape, layer_prefix, layer_tensors, tensor_shapes
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.forward import (
    BatchTokens,
    Model,
    default_chunk,
    layer,
    stored_dtype,
    to_tensor,
)

# Weights of the layers that are read while another weight set runs.
_MOST_AHEAD = 1 << 26


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


@dataclass
class TextsRun:
    """A weight set with its texts' hidden states x (n, L, d), which the layers overwrite.

    While its weights are those of the first run, x is that run's own.
    """

    config: Config
    backend: Backend
    source: Mapping[str, Any]
    x: Tensor
    dtype: torch.dtype
    sequences: BatchTokens


def _equal(first: Model, other: Model) -> bool:
    """Whether two models have the same weights."""
    return all(torch.equal(weight, other.weights[name]) for name, weight in first.weights.items())


def run_layer(
    index: int,
    runs: Sequence[TextsRun],
    rows: int,
    workers: Workers,
    watched: int,
    on_pass: Callable[[LayerPass], None] | None,
    chunk: int | None,
) -> None:
    """All runs through a layer, ``rows`` texts in a piece; ``on_pass`` is the last piece of each run.

    The first run's ``on_pass`` ends before another's begins. Small layers of two runs are in memory at a time.
    """

    def load(run: TextsRun) -> Model:
        names = [layer_prefix(index) + name for name in layer_tensors(run.config, index)]
        return part(run, names, chunk)

    def step(model: Model, some: Tensor, sequences: BatchTokens, first: int) -> None:
        sequences = replace(sequences, first_text=sequences.first_text + first)
        some.copy_(layer(model, index, some, sequences))

    def finish(passed: LayerPass, pieces: list[Future[None]]) -> None:
        for piece in pieces:
            piece.result()
        if on_pass:
            passes.append(workers.submit(on_pass, passed))
            passes[0].result()

    shapes = tensor_shapes(runs[0].config)
    weights = sum(
        math.prod(shapes[layer_prefix(index) + name]) for name in layer_tensors(runs[0].config, index)
    )
    overlapped = workers.count > 1 and weights <= _MOST_AHEAD
    first_model: Model | None = None
    any_shared = any(run.x is runs[0].x for run in runs[1:])
    before_all = runs[0].x.clone() if any_shared else runs[0].x
    started: deque[tuple[LayerPass, list[Future[None]]]] = deque()
    passes: list[Future[None]] = []
    ahead: Future[Model] | None = None
    for number, run in enumerate(runs):
        model = (ahead or workers.submit(load, run)).result()
        ahead = workers.submit(load, runs[number + 1]) if overlapped and number + 1 < len(runs) else None
        shared = number > 0 and run.x is runs[0].x
        if shared and first_model and not _equal(first_model, model):
            run.x, shared = before_all.clone(), False
        before = (before_all if shared else run.x)[:watched].clone()
        states = () if shared else run.x.split(rows)
        pieces = [workers.submit(step, model, some, run.sequences, i * rows) for i, some in enumerate(states)]
        if any_shared and number == 0:
            first_model = model
        started.append((LayerPass(index, number, model, run.sequences, before, run.x), pieces))
        del model, before
        if len(started) > overlapped:
            finish(*started.popleft())
    while started:
        finish(*started.popleft())
    for each in passes:
        each.result()


def part(run: TextsRun, names: Sequence[str], chunk: int | None) -> Model:
    """A model of which only these tensors are loaded."""
    shapes, weights = tensor_shapes(run.config), {}
    for name in names:
        weights[name] = to_tensor(run.source[name], stored_dtype(name, run.dtype), run.x.device)
        check_shape(name, weights[name].shape, shapes[name])
    return Model(
        run.config,
        run.backend.arrange(weights),
        run.dtype,
        run.x.device,
        run.backend,
        chunk or default_chunk(run.x.device),
    )
