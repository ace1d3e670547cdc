"""What each tensor costs in divergence at each format it could take: estimated from gradients, or measured.

For weights that are off by δ the mean divergence KL(original ‖ quantized) is ½ δᵀFδ to second order, F the Fisher
information of next-token distributions. With labels drawn from the model itself, F is the expectation of g gᵀ, g the
gradient of a label's log-likelihood (Martens 2020, section 9.2). One backward pass over a batch serves all tensors and
formats: products of labels drawn apart vanish in expectation, and so do those of different rows' rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bamba_quant.calibration.candidates import Candidates
from bamba_quant.inference.loading import LoadedModel
from bamba_quant.inference.weights import weights_on
from bamba_reference.backends import differentiable
from bamba_reference.packing import layout
from bamba_reference.tensors import HEAD, tensor_shapes
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

# Models of more weights are run again on the way back instead of keeping what is between their layers' operations.
_RECOMPUTED = 1_000_000_000


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
    memory: int = 2 << 30,
    progress: Progress = lambda done, total: None,
) -> Costs:
    """The second-order estimate of every cost over token ids ``chunks`` (n, ctx), all positions counted.

    ``batch`` chunks share a backward pass. ``memory`` bounds the bytes of differences that are held: where they take
    more, the text is passed over again for each group of tensors.
    """
    model = load(
        original.config,
        weights_on(original.weights, device, dtype),
        dtype=dtype,
        device=device,
        backend=differentiable(device, dtype),
    )
    targets = targets_of(original, candidates)
    groups = _groups(targets, original, memory)
    batches = [chunks[start : start + batch] for start in range(0, len(chunks), batch)]
    costs: Costs = {}
    for number, group in enumerate(groups):
        differences = [list(_differences(model, target, candidates)) for target in group]
        sums = [torch.zeros(len(target.formats), dtype=torch.float64, device=device) for target in group]
        weights = [model.weights[target.name].requires_grad_() for target in group]
        generator = torch.Generator(device).manual_seed(seed)  # the same labels for all groups
        for done, tokens in enumerate(batches):
            likelihood = _drawn_likelihood(model, tokens, generator)
            gradients = torch.autograd.grad(likelihood, weights)
            for found, some, gradient in zip(sums, differences, gradients, strict=True):
                for place, difference in enumerate(some):
                    found[place] += _half_square(gradient, difference)
            del gradients
            progress(number * len(batches) + done + 1, len(groups) * len(batches))
        for target, weight, found in zip(group, weights, sums, strict=True):
            weight.requires_grad_(False)
            means = (found / chunks.size).tolist()
            costs[target.gguf] = dict(zip(target.formats, means, strict=True))
    return costs


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
    model = load(original.config, weights_on(original.weights, device, dtype), dtype=dtype, device=device)
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
    model = load(original.config, weights_on(original.weights, device, dtype), dtype=dtype, device=device)
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


def _groups(targets: Sequence[Target], original: LoadedModel, memory: int) -> list[list[Target]]:
    """Neighbouring tensors whose differences in all formats, two bytes each, fit in ``memory``; one at least."""
    shapes = tensor_shapes(original.config)
    groups: list[list[Target]] = []
    held = 0
    for target in targets:
        n_bytes = 2 * len(target.formats) * int(np.prod(shapes[target.name], dtype=np.int64))
        if not groups or held + n_bytes > memory:
            groups.append([])
            held = 0
        groups[-1].append(target)
        held += n_bytes
    return groups


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


def _drawn_likelihood(model: Model, tokens: NDArray[np.int64], generator: torch.Generator) -> Tensor:
    """Σ log p(y) over all positions of ``tokens`` (B, L), each y drawn from the model's own distribution there."""
    ids, sequences = _sequences(model, tokens)
    x = embed(model, ids)
    again = sum(weight.numel() for weight in model.weights.values()) > _RECOMPUTED
    for number in range(model.config.num_hidden_layers):
        if again:
            x = checkpoint(layer, model, number, x, sequences, use_reentrant=False)
        else:
            x = layer(model, number, x, sequences)
    found = _log_probabilities(model, x).flatten(0, 1)  # (B·L, V)
    labels = torch.multinomial(found.detach().exp(), 1, generator=generator)
    return found.gather(-1, labels).sum()
