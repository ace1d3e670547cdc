"""Compare the weights of two models tensor by tensor, in any formats, without a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bamba_quant.checkpoint import RawReader, ReadOptions, StoredTensor
from bamba_quant.evaluation.drift import tensor_loss
from bamba_quant.evaluation.models import describe, open_models, tell_notes
from bamba_quant.evaluation.provenance import ModelFile
from bamba_quant.evaluation.result import TensorLoss
from bamba_quant.evaluation.tensor_loss import sqnr, tensor_difference
from bamba_quant.printable import brief_repr

_BYTES = 4 << 20  # of a tensor, that are compared at once


@dataclass(frozen=True)
class CodesChanged:
    """Two tensors of the same quantized format: ``changed`` of ``codes`` integers differ, and ``beside_changed`` of
    ``beside`` scales and minima.
    """

    name: str
    codes: int
    changed: int
    beside: int
    beside_changed: int


@dataclass(frozen=True)
class WeightsComparison:
    """Both models and every tensor's loss, in the model's order; ``sqnr`` is that of all weights together, in dB.

    ``codes`` is of the tensors that both models store in the same quantized format.
    """

    base: ModelFile
    other: ModelFile
    tensors: tuple[TensorLoss, ...]
    sqnr: float | None
    codes: tuple[CodesChanged, ...]

    __repr__ = brief_repr

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

    A few rows of a tensor are in memory at a time. ``progress`` is called with bytes of ``other`` done, ``note`` with
    what was tolerated in reading. Raises a ``BambaQuantError``
    for models that are not of one architecture, vocabulary and shape.
    """
    first, second = open_models(base, [other], reading)
    tell_notes((first, second), note)
    losses, codes, signal, noise = [], [], 0.0, 0.0
    for name in first.model.weights:
        apart = tensor_difference(first.model.weights, second.model.weights, name)
        losses.append(tensor_loss(first.model.weights, second.model.weights, name, apart))
        signal, noise = signal + math.fsum(apart.signal), noise + math.fsum(apart.noise)
        stored = [each.model.weights.stored(name)[0] for each in (first, second)]
        if (changed := codes_changed(*stored)) is not None:
            codes.append(replace(changed, name=name))
        progress(second.model.weights.info(name).n_bytes)
    return WeightsComparison(
        describe(first), describe(second), tuple(losses), sqnr(signal, noise), tuple(codes)
    )


def codes_changed(base: StoredTensor, other: StoredTensor) -> CodesChanged | None:
    """How many codes of ``other`` differ from those of ``base``; None unless both are of one quantized format."""
    layout, others = base.format.fields, other.format.fields
    if layout is None or others is None or base.format.name != other.format.name or base.shape != other.shape:
        return None
    if layout.group != others.group:
        return None
    counted = np.zeros(4, np.int64)
    step = max(1, _BYTES // base.row_bytes)
    with RawReader() as reader:
        for start in range(0, base.rows, step):
            stop = min(start + step, base.rows)
            raw = [np.empty((stop - start, tensor.row_bytes), np.uint8) for tensor in (base, other)]
            for tensor, rows in zip((base, other), raw, strict=True):
                reader.read_rows(tensor, tensor.row_bytes, start, stop, rows.reshape(-1))
            a, b = vars(layout.unpack(raw[0])), vars(others.unpack(raw[1]))
            for name, part in a.items():
                if part is not None:
                    counted[(0 if name == "codes" else 2) :][:2] += (
                        part.size,
                        np.count_nonzero(part != b[name]),
                    )
    return CodesChanged(base.name, *map(int, counted))
