"""Two models tensor by tensor, whatever each is stored in, without running either."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.checkpoint import ReadOptions
from bamba_quant.evaluation.drift import tensor_loss
from bamba_quant.evaluation.models import describe, open_models, tell_notes
from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import TensorLoss
from bamba_quant.evaluation.tensor_loss import difference, sqnr


@dataclass(frozen=True)
class WeightsComparison:
    """Both models and every tensor's loss, in the model's order; ``sqnr`` is that of all weights together, in dB."""

    base: ModelFile
    other: ModelFile
    tensors: tuple[TensorLoss, ...]
    sqnr: float | None

    @property
    def same(self) -> bool:
        """Whether every weight of the two is the same number."""
        return all(loss.max_error == 0 for loss in self.tensors)


def compare_weights(
    base: Path,
    other: Path,
    *,
    reading: ReadOptions = ReadOptions(),
    progress: Callable[[int], None] = lambda n_bytes: None,
    note: Callable[[str], None] = lambda note: None,
) -> WeightsComparison:
    """Compare the weights of ``other`` with those of ``base``, as a forward pass reads them.

    Some rows of a tensor are in memory at a time; ``progress`` is told bytes of ``other`` done, ``note`` what was
    tolerated in reading. Raises a
    ``BambaQuantError`` for models that are not of one architecture, vocabulary and shape.
    """
    first, second = open_models(base, [other], reading)
    tell_notes((first, second), note)
    losses, signal, noise = [], 0.0, 0.0
    for name in first.model.weights:
        apart = difference(first.model.weights, second.model.weights, name)
        losses.append(tensor_loss(first.model.weights, second.model.weights, name, apart, first.model.config))
        signal, noise = signal + math.fsum(apart.signal), noise + math.fsum(apart.noise)
        progress(second.model.weights.info(name).n_bytes)
    return WeightsComparison(describe(first), describe(second), tuple(losses), sqnr(signal, noise))
