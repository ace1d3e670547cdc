"""What each tensor costs in divergence at each format it could take: estimated from gradients, or measured.

For weights that are off by δ the mean divergence KL(original ‖ quantized) is ½ δᵀFδ to second order, F the Fisher
information of next-token distributions. With labels drawn from the model itself, F is the expectation of g gᵀ, g the
gradient of a label's log-likelihood (Martens 2020, section 9.2). One backward pass over a batch serves all tensors and
formats: products of labels drawn apart vanish in expectation, and so do those of different rows' rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.calibration.candidates import Candidates
from bamba_quant.inference.loading import LoadedModel
from bamba_quant.inference.weights import weights_on
from bamba_reference.backends import differentiable
from bamba_reference.packing import layout
from bamba_reference.tensors import EMBEDDING, FINAL_NORM, HEAD, head_name, layer_prefix, tensor_shapes
from bamba_reference.torch.forward import (
    BatchTokens,
    Model,
    embed,
    final_norm,
    head,
    layer,
    load,
    prepare,
    to_tensor,
)

Costs = dict[str, dict[str, float]]  # tensor by its GGUF name -> format -> nats a token
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Target:
    """A tensor whose cost is asked for: the reference's name, GGUF's, its layer and its formats."""

    name: str
    gguf: str
    layer: int | None
    formats: tuple[str, ...]


def targets_of(original: LoadedModel, candidates: Candidates) -> list[Target]:
    """The tensors that have candidates, in the order of the layers."""
    found = []
    for name in tensor_shapes(original.config):
        rule = original.weights.stored(name)[1]
        tensor = str(rule.gguf)
        if tensor in candidates.formats:
            found.append(Target(name, tensor, rule.layer, tuple(candidates.formats[tensor])))
    return found


def gradient_costs(
    original: LoadedModel,
    candidates: Candidates,
    chunks: NDArray[np.int64],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seed: int = 0,
    memory: int = 4 << 30,
    progress: Progress = lambda done, total: None,
) -> Costs:
    """The second-order estimate of every cost over token ids ``chunks`` (n, ctx), all positions counted.

    ``batch`` chunks share a backward pass, which goes back a layer at a time for all of them, so that each layer's
    candidates are read once. What enters the layers is kept, in ``memory`` bytes at most: a longer text is passed in
    parts.
    """
    model = _model(original, device, dtype)
    targets = targets_of(original, candidates)
    each = chunks.shape[1] * original.config.hidden_size * dtype.itemsize * original.config.num_hidden_layers
    together = max(1, memory // (each * batch)) * batch
    generator = torch.Generator(device).manual_seed(seed)
    sums = {
        target: torch.zeros(len(target.formats), dtype=torch.float64, device=device) for target in targets
    }
    steps = (original.config.num_hidden_layers + 2) * -(-len(chunks) // together)
    for part, start in enumerate(range(0, len(chunks), together)):
        some = chunks[start : start + together]
        back = _Backward(model, [some[i : i + batch] for i in range(0, len(some), batch)], generator)
        for done, (prefixes, pass_back) in enumerate(back.units()):
            here = [target for target in targets if target.name.startswith(prefixes)]
            differences = {target: list(_differences(model, target, candidates)) for target in here}
            for gradients in pass_back([target.name for target in here]):
                for target, gradient in zip(here, gradients, strict=True):
                    for place, difference in enumerate(differences[target]):
                        sums[target][place] += _half_square(gradient, difference)
            progress(part * (steps // -(-len(chunks) // together)) + done + 1, steps)
    return {
        target.gguf: dict(zip(target.formats, (found / chunks.size).tolist(), strict=True))
        for target, found in sums.items()
    }


Passed = Callable[[list[str]], Iterator[tuple[Tensor, ...]]]


class _Backward:
    """Passes back the gradients of Σ log p(y) over all positions, each y drawn from the model's own distribution."""

    def __init__(
        self, model: Model, batches: Sequence[NDArray[np.int64]], generator: torch.Generator
    ) -> None:
        self._model, self._generator = model, generator
        self._batches = [_sequences(model, tokens) for tokens in batches]
        self._kept: list[list[Tensor]] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []  # what left the last layer, and the labels
        with torch.no_grad():
            self._ends = [embed(model, ids) for ids, _ in self._batches]
            for number in range(model.config.num_hidden_layers):
                self._kept.append(self._ends)
                self._ends = [
                    layer(model, number, x, sequences)
                    for x, (_, sequences) in zip(self._ends, self._batches, strict=True)
                ]

    def units(self) -> Iterator[tuple[tuple[str, ...], Passed]]:
        """From the head to the embedding: what names of tensors begin with, and a function that gives each batch's
        gradients of the tensors that it is asked for. A unit is to be passed before the next.
        """
        tied = head_name(self._model.config) == EMBEDDING
        yield (FINAL_NORM, *(() if tied else (HEAD,))), self._head
        for number in reversed(range(self._model.config.num_hidden_layers)):
            yield (layer_prefix(number),), partial(self._layer, number)
        yield (EMBEDDING,), self._embedding

    def _head(self, names: list[str]) -> Iterator[tuple[Tensor, ...]]:
        ends = []
        for x in self._ends:
            model, leaves, x = self._leaves(names, x)
            found = _log_probabilities(model, x).flatten(0, 1)  # (B·L, V)
            labels = torch.multinomial(found.detach().exp(), 1, generator=self._generator)
            self._drawn.append((x.detach(), labels))
            end, *gradients = torch.autograd.grad(found.gather(-1, labels).sum(), [x, *leaves])
            ends.append(end)
            yield tuple(gradients)
        self._ends = ends

    def _layer(self, number: int, names: list[str]) -> Iterator[tuple[Tensor, ...]]:
        ends = []
        for x, end, (_, sequences) in zip(self._kept.pop(), self._ends, self._batches, strict=True):
            model, leaves, x = self._leaves(names, x)
            y = layer(model, number, x, sequences)
            begin, *gradients = torch.autograd.grad(y, [x, *leaves], end)
            ends.append(begin)
            yield tuple(gradients)
        self._ends = ends

    def _embedding(self, names: list[str]) -> Iterator[tuple[Tensor, ...]]:
        for (ids, _), end, (x, labels) in zip(self._batches, self._ends, self._drawn, strict=True):
            model, leaves, _ = self._leaves(names, end)
            if not leaves:
                continue
            parts, ends = [embed(model, ids)], [end]
            if head_name(model.config) == EMBEDDING:  # which multiplies what leaves the last layer too
                parts.append(_log_probabilities(model, x).flatten(0, 1).gather(-1, labels).sum())
                ends.append(torch.ones_like(parts[-1]))
            yield torch.autograd.grad(parts, leaves, ends)

    def _leaves(self, names: Sequence[str], x: Tensor) -> tuple[Model, list[Tensor], Tensor]:
        """The model with tensors that want gradients, these tensors, and x as another."""
        leaves = {name: self._model.weights[name].detach().requires_grad_() for name in names}
        model = replace(self._model, weights={**self._model.weights, **leaves})
        return model, list(leaves.values()), x.detach().requires_grad_()


def measured_costs(
    original: LoadedModel,
    candidates: Candidates,
    chunks: NDArray[np.int64],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    progress: Progress = lambda done, total: None,
) -> Costs:
    """The mean divergence with one tensor at a time in each format, all others as they are; arguments as above."""
    model = _model(original, device, dtype)
    targets = targets_of(original, candidates)
    starts = range(0, len(chunks), batch)
    sums = {(target.gguf, name): 0.0 for target in targets for name in target.formats}
    done, total = 0, len(starts) * len(sums)
    with torch.no_grad():
        for start in starts:
            ids, sequences = _sequences(model, chunks[start : start + batch])
            streams = [embed(model, ids)]
            for number in range(original.config.num_hidden_layers):
                streams.append(layer(model, number, streams[-1], sequences))
            expected = _log_probabilities(model, streams[-1])
            for target in targets:
                first = 0 if target.layer is None else target.layer
                for name in target.formats:
                    other = quantized(model, {target: name}, candidates)
                    x = streams[first] if target.layer is not None else embed(other, ids)
                    if target.name == HEAD:
                        x = streams[-1]
                    else:
                        for number in range(first, original.config.num_hidden_layers):
                            x = layer(other, number, x, sequences)
                    sums[target.gguf, name] += divergence(expected, _log_probabilities(other, x))
                    done += 1
                progress(done, total)
    costs: Costs = {target.gguf: {} for target in targets}
    for (tensor, name), found in sums.items():
        costs[tensor][name] = found / chunks.size
    return costs


def measured_divergence(
    original: LoadedModel,
    candidates: Candidates,
    assignments: Sequence[Mapping[Target, str]],
    chunks: NDArray[np.int64],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> list[float]:
    """The mean divergence of each assignment of formats to tensors, all at once; arguments as above."""
    model = _model(original, device, dtype)
    sums = [0.0] * len(assignments)
    with torch.no_grad():
        for number, assignment in enumerate(assignments):
            other = quantized(model, assignment, candidates)
            for start in range(0, len(chunks), batch):
                ids, sequences = _sequences(model, chunks[start : start + batch])
                expected, found = (
                    _log_probabilities(each, _stream(each, ids, sequences)) for each in (model, other)
                )
                sums[number] += divergence(expected, found)
    return [total / chunks.size for total in sums]


def _model(original: LoadedModel, device: torch.device, dtype: torch.dtype) -> Model:
    """The original on a device; its kernels have gradients on a GPU, and on a CPU torch's operations have."""
    weights, backend = weights_on(original.weights, device, dtype), differentiable(device, dtype)
    return load(original.config, weights, dtype=dtype, device=device, backend=backend)


def _stream(model: Model, ids: Tensor, sequences: BatchTokens) -> Tensor:
    x = embed(model, ids)
    for number in range(model.config.num_hidden_layers):
        x = layer(model, number, x, sequences)
    return x


def quantized(model: Model, formats: Mapping[Target, str], candidates: Candidates) -> Model:
    """``model`` with these tensors in these formats."""
    weights = dict(model.weights)
    for target, name in formats.items():
        weights[target.name] = _candidate(model, target, candidates, name).to(weights[target.name].dtype)
    return replace(model, weights=weights)


def divergence(expected: Tensor, found: Tensor) -> float:
    """The sum over positions of KL(expected ‖ found), nats, of log-probabilities (B, L, V)."""
    return float((expected.exp() * (expected - found)).sum(-1).double().sum())


def _candidate(model: Model, target: Target, candidates: Candidates, name: str) -> Tensor:
    """The tensor in the format ``name``, dequantized, as the model has it in memory."""
    found: Mapping[str, Any] = weights_on(candidates.weights(target.gguf, name), model.device, torch.float32)
    return to_tensor(found[target.name], torch.float32, model.device)


def _differences(model: Model, target: Target, candidates: Candidates) -> Iterator[Tensor]:
    """Quantized minus original in each format, as bfloat16: eight bits of an error are enough for its square."""
    weight = model.weights[target.name].detach().float()
    for name in target.formats:
        yield (_candidate(model, target, candidates, name) - weight).to(torch.bfloat16)


def _half_square(gradient: Tensor, difference: Tensor) -> Tensor:
    """½ Σ over rows of (gradient · difference)², of tensors (…, rows, columns)."""
    return 0.5 * (gradient.float() * difference).sum(-1).double().square().sum()


def _sequences(model: Model, tokens: NDArray[np.int64]) -> tuple[Tensor, BatchTokens]:
    ids = torch.from_numpy(np.ascontiguousarray(tokens)).to(model.device)
    return ids, prepare(model.config, layout(tokens.shape), model.dtype, model.device)


def _log_probabilities(model: Model, x: Tensor) -> Tensor:
    return torch.log_softmax(head(model, final_norm(model, x)).float(), -1)
