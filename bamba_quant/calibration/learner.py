"""What a schedule of tuning advances step by step: latents, their optimizer and their running means.

``WholeModel`` holds everything in float32 and lets autograd pass through the whole model. ``by_layer.ByLayer`` does the
same a layer at a time, for models that this does not fit beside.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bamba_quant.calibration.latents import LatentTensor
from bamba_quant.calibration.learning_rates import groups_of, mean_decay
from bamba_quant.calibration.optimizer import Adam
from bamba_quant.calibration.student import HeldOut, gradients, model_of, passes, weights_now
from bamba_quant.calibration.tune_data import Ints
from bamba_quant.calibration.tune_options import TuneOptions
from bamba_reference.torch.forward import BatchTokens, Model

Snapshot = dict[str, dict[str, Tensor]]

_WARM_STEPS = 3  # on a GPU, before a step is recorded as a graph


class Learner(ABC):
    """Latents that learn by Adam; what is measured and kept is their running mean.

    A GPU is given ``together`` steps before it is waited for. ``belongs`` is what a run that goes on must have in
    common besides the options.
    """

    together = 10

    def __init__(self, latents: Sequence[LatentTensor], options: TuneOptions, device: torch.device) -> None:
        self.latents, self._options, self.device = list(latents), options, device
        self.belongs: dict[str, int] = {}
        self.adam = Adam(groups_of(self.latents, options), options.eps)
        self._means = [p.detach().clone() for p in self.adam.parameters] if options.ema != 0 else []
        self._mean_weight = torch.zeros((), device=device)

    def prepare(self, step: int, steps: int, factor: float) -> None:
        """For step number ``step`` of ``steps``, counted from 1, at ``factor`` of the first learning rates."""
        self.adam.prepare(step, steps, factor)
        self._mean_weight.fill_(1 - mean_decay(self._options, steps))

    @abstractmethod
    def advance(self, ids: Ints, numbers: Ints) -> Tensor:
        """One step on the tokens (batch, ctx) of chunks with these numbers: the mean divergence before, in nats."""

    @abstractmethod
    def divergence(self) -> float:
        """Of the running mean, on the held-out text: nats a token."""

    def snapshot(self) -> Snapshot:
        """What the latents' ``raw`` needs of the running mean."""
        with self._averaged():
            return {latent.name: latent.snapshot() for latent in self.latents}

    def arrays(self) -> dict[str, Tensor]:
        """Everything that a later run needs, by name, to be saved and to be written into."""
        found: dict[str, Tensor] = {}
        for kind, tensors in (("latent", self.adam.parameters), ("first", self.adam.first),
                              ("second", self.adam.second), ("mean", self._means)):  # fmt: skip
            found |= {
                f"{kind}:{name}": tensor.detach()
                for name, tensor in zip(self.adam.names, tensors, strict=False)
            }
        return found

    @torch.no_grad()
    def _move(self) -> None:
        """The optimizer's step along the gradients, and the running mean's."""
        self.adam.step()
        for latent in self.latents:
            latent.clamp()
        if self._means:
            ahead = torch._foreach_sub(self.adam.parameters, self._means)
            torch._foreach_mul_(ahead, self._mean_weight)
            torch._foreach_add_(self._means, ahead)

    @contextmanager
    @torch.no_grad()
    def _averaged(self) -> Iterator[None]:
        """With the running mean in the place of the parameters."""
        kept = [p.detach().clone() for p in self.adam.parameters] if self._means else []
        for parameter, mean in zip(self.adam.parameters, self._means, strict=False):
            parameter.copy_(mean)
        yield
        for parameter, value in zip(self.adam.parameters, kept, strict=False):
            parameter.copy_(value)


class WholeModel(Learner):
    """The gradients of all weights at once, by autograd in float32; on a GPU a step is recorded as a CUDA graph."""

    def __init__(
        self,
        latents: Sequence[LatentTensor],
        constants: Mapping[str, Tensor],
        original: Model,
        sequences: BatchTokens,
        held_out: Tensor,
        known: Tensor | None,
        options: TuneOptions,
        batch: int,
        micro_batch: int,
        note: Callable[[str], None],
    ) -> None:
        super().__init__(latents, options, original.device)
        device = original.device
        self._constants, self._original, self._sequences = constants, original, sequences
        self._known, self._micro_batch, self._note = known, micro_batch, note
        self._held_out = HeldOut(
            held_out, original.config.vocab_size, *passes(original, sequences, micro_batch)
        )
        self._ids = torch.zeros(batch, options.ctx, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(batch, dtype=torch.int64, device=device)
        self._graphs = options.graph and device.type == "cuda"
        self._graph: Any = None
        self._warm = 0
        self._loss = torch.zeros((), device=device)

    def advance(self, ids: Ints, numbers: Ints) -> Tensor:
        self._ids.copy_(torch.from_numpy(ids))
        self._numbers.copy_(torch.from_numpy(numbers))
        if not self._graphs:
            self._loss = self._work()
        elif self._graph is not None:
            self._graph.replay()
        elif self._warm < _WARM_STEPS:
            self._warm += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._loss = self._work()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._record()
        return self._loss

    def divergence(self) -> float:
        with self._averaged():
            model = model_of(
                self._original.config, weights_now(self._constants, self.latents), self._original.device
            )
            found: float = self._held_out.divergence(*passes(model, self._sequences, self._micro_batch))
            return found

    def _record(self) -> None:
        """Record a step as a CUDA graph and run it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loss = self._work()
        except RuntimeError as error:
            self._graphs = False
            self._note(
                f"a step cannot be recorded as a CUDA graph and runs as it is: {str(error).splitlines()[0]}"
            )
            for parameter in self.adam.parameters:
                parameter.grad = None
            self._loss = self._work()
            return
        self._graph = graph
        graph.replay()

    def _work(self) -> Tensor:
        options = self._options
        loss = gradients(
            self._original.config, self._original, self._constants, self.latents, self._ids, self._sequences,
            self._micro_batch, options.recompute, None if self._known is None else self._known[self._numbers],
        )  # fmt: skip
        self._move()
        return loss
