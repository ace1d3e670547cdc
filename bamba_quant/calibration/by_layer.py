"""Tuning a layer at a time: the same gradients as of the whole model, of which one layer's weights exist at a time.

Forward, every layer's weights are made of its codes and let go; what enters each layer is kept. Backward, they are
made again, the layer is run once more with gradients, and its codes learn at once, so that no gradient outlives its
layer. Activations and weights are bfloat16, products are summed and divergences computed in float32. Codes with the
optimizer's state (8 bytes a weight) and the original (2) are on the GPU, or in main memory, from where a layer is
copied while another is computed.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bamba_quant.calibration.coded_latents import CodedMatrix, Rates
from bamba_quant.calibration.learner import Learner
from bamba_quant.calibration.learning_rates import mean_decay, rate_of
from bamba_quant.calibration.optimizer import bias_correction
from bamba_quant.calibration.student import HeldOut, blocks_of, divergence_with_gradient
from bamba_quant.calibration.tune_data import Ints
from bamba_quant.calibration.tune_options import TuneOptions
from bamba_quant.calibration.units import DTYPE, Codes, Original, Weights, backends, units_of
from bamba_reference.packing import layout
from bamba_reference.tensors import EMBEDDING, FINAL_NORM, head_name, tensor_shapes
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.forward import (
    Model,
    default_chunk,
    embed,
    final_norm,
    head,
    layer,
    prepare,
    stored_dtype,
)

_ROWS = 1 << 14  # of the head's gradient that are multiplied together


class ByLayer(Learner):
    """See the module. ``constants`` are the student's tensors that are not learned; ``micro_batch`` chunks pass a
    layer together.
    """

    together = 1

    def __init__(
        self,
        original: Original,
        codes: Codes,
        latents: Sequence[Any],
        constants: Mapping[str, Tensor],
        held_out: Tensor,
        options: TuneOptions,
        micro_batch: int,
        device: torch.device,
        on_host: bool = False,
        reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        super().__init__(latents, options, device)
        self.belongs = {"micro_batch": micro_batch}
        self._original, self._codes, self._constants = original, codes, constants
        self._config, self._device, self._micro_batch = original.config, device, micro_batch
        self._reduce = reduce
        self._backend, self._learning = backends(device)
        self._units = units_of(original.config)
        self._last = len(self._units) - 1
        self._tied = head_name(original.config) == EMBEDDING
        self._vectors = {latent.name: latent for latent in latents if not isinstance(latent, CodedMatrix)}
        self._numbers = {latent.name: number for number, latent in enumerate(latents)}
        self._sequences = prepare(original.config, layout((1, options.ctx)), DTYPE, device)
        self._now = (1, 1, 1.0)
        tokens = micro_batch * options.ctx
        self._block = max(
            1, min(tokens, blocks_of(tokens, original.config.vocab_size, device) // (4 if on_host else 1))
        )
        self._held_out = HeldOut(
            held_out,
            original.config.vocab_size,
            lambda ids: self._states(original.weights, ids),
            self._originals,
        )

    def prepare(self, step: int, steps: int, factor: float) -> None:
        super().prepare(step, steps, factor)
        self._now = step, steps, factor

    def advance(self, ids: Ints, numbers: Ints) -> Tensor:
        tokens = torch.from_numpy(ids).to(self._device)
        with torch.no_grad():
            wanted = self._states(self._original.weights, tokens)
            kept: list[list[Tensor]] = []
            ends = self._streams(self._weights, tokens, kept)
        loss, ends, of_head = self._learn_head(ends, wanted)
        for index in reversed(range(self._config.num_hidden_layers)):
            ends = self._learn_layer(index, kept.pop(), ends)
        self._learn_embedding(tokens, ends, of_head)
        self._move()
        return loss

    @torch.no_grad()
    def divergence(self) -> float:
        with self._averaged():
            found: float = self._held_out.divergence(
                lambda ids: self._states(self._means_of, ids), lambda x: self._logits(self._means_of, x)
            )
            return found

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        found = {}
        with self._averaged():
            for number in range(len(self._units)):
                for matrix in self._codes.take(number, None, whole=True):
                    found[matrix.name] = matrix.snapshot()
            found |= {name: vector.snapshot() for name, vector in self._vectors.items()}
        return found

    def arrays(self) -> dict[str, Tensor]:
        self._codes.residence.settle()
        changing = {f"codes:{number}": part for number, part in enumerate(self._codes.changing())}
        tops = {f"top:{m.name}": m.top.view(1) for matrices in self._codes.matrices for m in matrices}
        return super().arrays() | changing | tops

    def _model(self, weights: Weights, backend: Backend) -> Model:
        return Model(self._config, weights, DTYPE, self._device, backend, default_chunk(self._device))

    def _weights(self, number: int, then: int | None, mean: bool = False, whole: bool = False) -> Weights:
        """The student's weights of a unit, without gradients."""
        matrices = self._codes.take(number, then, whole=mean or whole)
        found = {matrix.name: matrix.weight(stored_dtype(matrix.name, DTYPE), mean) for matrix in matrices}
        for name in self._units[number]:
            if name in self._vectors:
                found[name] = self._vectors[name].weight().detach().to(stored_dtype(name, DTYPE))
            elif name not in found:
                found[name] = self._constants[name]
        return found

    def _means_of(self, number: int, then: int | None) -> Weights:
        return self._weights(number, then, mean=True)

    def _streams(
        self,
        weights: Callable[[int, int | None], Weights],
        ids: Tensor,
        kept: list[list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """What leaves the last layer, (b, L, d) each micro-batch; ``kept`` gets what enters each layer."""
        model = self._model(weights(0, 1), self._backend)
        parts = [embed(model, some) for some in ids.split(self._micro_batch)]
        for index in range(self._config.num_hidden_layers):
            if kept is not None:
                kept.append(parts)
            model = self._model(self._backend.arrange(weights(index + 1, index + 2)), self._backend)
            parts = [layer(model, index, x, self._sequences) for x in parts]
        return parts

    def _states(self, weights: Callable[[int, int | None], Weights], ids: Tensor) -> Tensor:
        """What the head multiplies, (B, L, d)."""
        parts = self._streams(weights, ids)
        model = self._model(weights(self._last, None), self._backend)
        return torch.cat([final_norm(model, x) for x in parts])

    def _with_head(self, weights: Callable[[int, int | None], Weights]) -> Weights:
        found = weights(self._last, None)
        return found | weights(0, None) if self._tied else found

    def _logits(self, weights: Callable[[int, int | None], Weights], x: Tensor) -> Tensor:
        return head(self._model(self._with_head(weights), self._backend), x)

    def _originals(self, x: Tensor) -> Tensor:
        return self._logits(self._original.weights, x)

    def _learn_head(self, ends: list[Tensor], wanted: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The divergence, its gradients of what left the last layer, and that of the head where it is the embedding."""
        weights = self._with_head(lambda number, then: self._weights(number, then, whole=True))
        original = self._model(self._with_head(self._original.weights), self._backend)
        leaf = {FINAL_NORM: weights[FINAL_NORM].detach().requires_grad_()}
        model = self._model(weights | leaf, self._learning)
        name = head_name(self._config)
        matrix = weights[name]
        learns = name in self._numbers
        of_matrix = torch.zeros(matrix.shape, device=self._device) if learns else None
        total, gradients = torch.zeros((), device=self._device), []
        scale = 1 / (wanted.shape[0] * wanted.shape[1] * self._config.logits_scaling)
        for x, theirs in zip(ends, wanted.split(self._micro_batch), strict=True):
            x = x.detach().requires_grad_()
            states = final_norm(model, x)
            flat, theirs = states.detach().flatten(0, 1), theirs.flatten(0, 1)
            back = torch.empty_like(flat)
            for some in range(0, len(flat), step := self._block):
                now = slice(some, some + step)
                with torch.no_grad():
                    divergence, g = divergence_with_gradient(
                        head(replace(model, backend=self._backend), flat[now]), head(original, theirs[now])
                    )
                    g = g.mul_(scale).to(DTYPE)
                    back[now] = g @ matrix
                    if of_matrix is not None:
                        _add_product(of_matrix, g, flat[now])
                total += divergence
            states.backward(back.view(states.shape))
            gradients.append(x.grad)
        self._learn(self._last, leaf | ({} if self._tied else {name: (matrix, of_matrix)}))
        return total / wanted[..., 0].numel(), gradients, of_matrix if self._tied else None

    def _learn_layer(self, index: int, parts: list[Tensor], ends: list[Tensor]) -> list[Tensor]:
        """The gradients of what enters the layer, from those of what leaves it."""
        number = index + 1
        weights = self._weights(number, number - 1, whole=True)
        leaves = {
            name: w.detach().requires_grad_() if name in self._numbers else w for name, w in weights.items()
        }
        model = self._model(leaves, self._learning)
        gradients = []
        for x, end in zip(parts, ends, strict=True):
            x = x.detach().requires_grad_()
            layer(model, index, x, self._sequences).backward(end)
            gradients.append(x.grad)
        self._learn(number, leaves)
        return gradients

    def _learn_embedding(self, ids: Tensor, ends: list[Tensor], of_head: Tensor | None) -> None:
        if EMBEDDING not in self._numbers:
            return
        gradient = of_head
        if gradient is None:
            shape = tensor_shapes(self._config)[EMBEDDING]
            gradient = torch.zeros(shape, device=self._device)
        rows = torch.cat(ends).flatten(0, 1).float() * self._config.embedding_multiplier
        gradient.index_put_((ids.flatten(),), rows, accumulate=True)  # in a fixed order, also on a GPU
        self._codes.take(0, None, whole=True)
        self._learn(0, {EMBEDDING: (gradient, gradient)})

    def _learn(self, number: int, leaves: Mapping[str, Any]) -> None:
        """Codes, scales and vectors of a unit learn from the gradients of their weights: tensors with a gradient, or
        pairs of the weight and the gradient.
        """
        gradients = {
            name: leaf[1] if isinstance(leaf, tuple) else leaf.grad
            for name, leaf in leaves.items()
            if name in self._numbers
        }
        for matrix in self._codes.matrices[number]:
            gradient = gradients.get(matrix.name)
            if gradient is not None:
                matrix.learn(self._reduce(gradient), self._rates(matrix))
        self._codes.give_back(number)
        for name, gradient in gradients.items():
            if name in self._vectors and gradient is not None:
                torch.autograd.backward([self._vectors[name].weight()], [self._reduce(gradient.float())])

    def _rates(self, matrix: CodedMatrix) -> Rates:
        step, steps, factor = self._now
        options = self._options
        rate = rate_of(options, "codes", matrix.bits, steps) * factor * bias_correction(step)
        seed = (options.seed * 2654435761 + step * 40503 + self._numbers[matrix.name]) & 0x7FFFFFFF
        return Rates(rate, options.eps, 1 - mean_decay(options, steps), seed)


def _add_product(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Add gᵀ x to ``total`` (V, d), float32, of 16-bit g (T, V) and x (T, d): some rows at a time."""
    for start in range(0, len(total), _ROWS):
        rows = g[:, start : start + _ROWS].t()
        product = torch.mm(rows, x, out_dtype=torch.float32) if x.is_cuda else rows.float() @ x.float()
        total[start : start + _ROWS] += product
