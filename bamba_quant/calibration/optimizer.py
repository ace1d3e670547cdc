"""Adam over many tensors at once, with a learning rate of each group and state that can be saved."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.99


def bias_correction(step: int) -> float:
    """What the learning rate of a step, counted from 1, is multiplied by because both moments start at 0."""
    return float((1 - BETA2**step) ** 0.5 / (1 - BETA1**step))


@dataclass(frozen=True)
class Group:
    """Parameters by name, and their learning rate at the beginning of a schedule of so many steps."""

    parameters: dict[str, Tensor]
    rate: Callable[[int], float]


class Adam:
    """Kingma and Ba (2015), 1412.6980, in the order of the last lines of its section 2, with ``eps`` beside the root
    of the raw second moment. ``prepare`` sets what depends on the step; ``step`` can then be recorded in a CUDA graph.
    """

    def __init__(self, groups: Sequence[Group], eps: float) -> None:
        self._eps = eps
        self.names = [name for group in groups for name in group.parameters]
        self.parameters = [p for group in groups for p in group.parameters.values()]
        self.first = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.second = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self._sizes = [len(group.parameters) for group in groups]
        self._rates = [group.rate for group in groups]
        self._now = [torch.zeros((), device=next(iter(g.parameters.values())).device) for g in groups]

    def prepare(self, step: int, steps: int, factor: float) -> None:
        """For step number ``step`` of ``steps``, counted from 1, at ``factor`` of the first learning rates."""
        corrected = bias_correction(step)
        for now, rate in zip(self._now, self._rates, strict=True):
            now.fill_(rate(steps) * factor * corrected)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters along their gradients, which are then let go; one without any moves as if it were 0."""
        start = 0
        for size, rate in zip(self._sizes, self._now, strict=True):
            here = slice(start, start + size)
            start += size
            parameters = self.parameters[here]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            torch._foreach_lerp_(self.first[here], gradients, 1 - BETA1)
            torch._foreach_mul_(self.second[here], BETA2)
            torch._foreach_addcmul_(self.second[here], gradients, gradients, 1 - BETA2)
            moves = torch._foreach_sqrt(self.second[here])
            torch._foreach_add_(moves, self._eps)
            torch._foreach_reciprocal_(moves)
            torch._foreach_mul_(moves, self.first[here])
            torch._foreach_mul_(moves, rate)
            torch._foreach_sub_(parameters, moves)
            for parameter in parameters:
                parameter.grad = None
