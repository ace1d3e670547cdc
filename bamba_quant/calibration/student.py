"""One step of tuning: the divergence of a model with latent weights from the original, and its gradients.

Weights are made of the latents once a step. Activations exist for a micro-batch, logits for a block of tokens at a
time; gradients are gathered by weight and go back to the latents in the end.
"""
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bamba_quant.calibration import narrow_gradients
from bamba_quant.calibration.latents import LatentTensor
from bamba_reference.config import Config
from bamba_reference.packing import layout
from bamba_reference.torch.backend import TORCH
from bamba_reference.torch.forward import (
    BatchTokens,
    Model,
    default_chunk,
    embed,
    final_norm,
    head,
    layer,
    prepare,
)

_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 28}  # logits of a model that exist together


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 on a GPU in "highest" precision, or "high": what enters them is rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def model_of(config: Config, weights: Mapping[str, Tensor], device: torch.device) -> Model:
    """A float32 model of these weights, differentiable."""
    backend = TORCH
    if narrow_gradients.supported(device):
        backend = TORCH.with_linear(narrow_gradients.linear, head=narrow_gradients.head)
    return Model(config, weights, torch.float32, device, backend, default_chunk(device))


def sequences_of(config: Config, ctx: int, device: torch.device) -> BatchTokens:
    """Rows of ``ctx`` tokens that begin at 0, without padding."""
    return prepare(config, layout((1, ctx)), torch.float32, device)


def hidden(model: Model, ids: Tensor, sequences: BatchTokens, recompute: bool = False) -> Tensor:
    """What the head multiplies, (B, L, d), of tokens (B, L) on the model's device."""
    x = embed(model, ids)
    for i in range(model.config.num_hidden_layers):
        if recompute:
            x = checkpoint(layer, model, i, x, sequences, use_reentrant=False)
        else:
            x = layer(model, i, x, sequences)
    return final_norm(model, x)


def divergence_with_gradient(student: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t KL(p_t ‖ q_t) of the student's logits (T, V) from the original's, float32, and its gradient of the first."""
    log_p, log_q = original.log_softmax(-1), student.log_softmax(-1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum()
    return divergence, log_q.exp_().sub_(p)


class _Divergence(torch.autograd.Function):
    """``divergence_with_gradient``, differentiable in the student's logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, original: Tensor) -> Tensor:
        divergence, gradient = divergence_with_gradient(student, original)
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0], None


def blocks_of(tokens: int, vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits exist together."""
    return max(1, min(tokens, _LOGITS.get(device.type, _LOGITS["cpu"]) // vocab_size))


def gradients(
    config: Config,
    original: Model,
    constants: Mapping[str, Tensor],
    latents: Sequence[LatentTensor],
    ids: Tensor,
    sequences: BatchTokens,
    micro_batch: int,
    recompute: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """Mean KL(original ‖ student) over all positions of ids (B, L), nats a token; adds its gradients to the latents'.

    ``constants`` are the student's weights that are not learned; ``known`` (B, L, d) is what the original's head is
    given, where that is known already.
    """
    made = {latent.name: latent.weight() for latent in latents}
    leaves = {name: w.detach().requires_grad_() for name, w in made.items()}
    student = model_of(config, {**constants, **leaves}, ids.device)
    total = torch.zeros((), device=ids.device)
    for first in range(0, len(ids), micro_batch):
        some = ids[first : first + micro_batch]
        with torch.no_grad():
            states = (
                hidden(original, some, sequences) if known is None else known[first : first + micro_batch]
            )
            wanted = states.flatten(0, 1)  # (T, d)
        found = hidden(student, some, sequences, recompute).flatten(0, 1)
        ends = found.detach().requires_grad_()
        step = blocks_of(len(ends), config.vocab_size, ids.device)
        for start in range(0, len(ends), step):
            now = slice(start, start + step)
            with torch.no_grad():
                logits = head(original, wanted[now])
            divergence: Tensor = _Divergence.apply(head(student, ends[now]), logits) / ids.numel()
            divergence.backward()
            total += divergence.detach()
        found.backward(ends.grad)
    learned = [(made[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([w for w, _ in learned], [gradient for _, gradient in learned])
    return total


@torch.no_grad()
def states_of(original: Model, chunks: Tensor, sequences: BatchTokens, micro_batch: int) -> Tensor:
    """What the original's head is given, (n, L, d), of chunks (n, L)."""
    states = torch.empty(*chunks.shape, original.config.hidden_size, device=chunks.device)
    for first in range(0, len(chunks), micro_batch):
        now = slice(first, first + micro_batch)
        states[now] = hidden(original, chunks[now], sequences)
    return states


@torch.no_grad()
def weights_now(constants: Mapping[str, Tensor], latents: Iterable[LatentTensor]) -> dict[str, Tensor]:
    """All weights of the state that the latents round to."""
    return {**constants, **{latent.name: latent.weight() for latent in latents}}


def passes(
    model: Model, sequences: BatchTokens, micro_batch: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What ``HeldOut`` asks of a model: from tokens (n, L) to what the head multiplies, and from there to logits."""

    def states(ids: Tensor) -> Tensor:
        return torch.cat([hidden(model, some, sequences) for some in ids.split(micro_batch)])

    return states, lambda x: head(model, x)


class HeldOut:
    """Text that is only measured on: chunks (n, L), and what the original's head is given at the scored positions.

    These are an evaluation's: of each chunk's second half those that have a next token. ``hidden`` are functions from
    tokens (n, L) to what a model's head multiplies (n, L, d), ``logits`` from these (T, d) to logits (T, V).
    """

    def __init__(
        self,
        ids: Tensor,
        vocab_size: int,
        hidden: Callable[[Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        self._ids, self._vocab_size, self._logits = ids, vocab_size, logits
        with products("highest"):
            self._wanted = self._scored(hidden)

    @torch.no_grad()
    @products("highest")
    def divergence(self, hidden: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor]) -> float:
        """Mean KL(original ‖ model) in nats a token, summed in float64."""
        found = self._scored(hidden)
        step = max(1, blocks_of(len(found), self._vocab_size, found.device) // 4)
        total = 0.0
        for ours, theirs in zip(found.split(step), self._wanted.split(step), strict=True):
            log_p = self._logits(theirs).double().log_softmax(-1)
            log_q = logits(ours).double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return total / len(found)

    @torch.no_grad()
    def _scored(self, hidden: Callable[[Tensor], Tensor]) -> Tensor:
        return hidden(self._ids)[:, self._ids.shape[1] // 2 : -1].flatten(0, 1)
