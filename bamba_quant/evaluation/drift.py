"""Where a candidate loses: the error of each tensor and the drift of each layer; rows of ssm_in by what they mean.

While layers stream, the base's inputs to every matrix of the current layer are kept for the first texts, and every
candidate's matrices are multiplied by the same inputs; both are freed with the layer. Weights are compared as the files
store them, a few rows at a time, while the page cache, or the GPU that decoded them, still holds the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.evaluation.result import LayerDrift, RowClass, TensorLoss
from bamba_quant.evaluation.tensor_loss import CPU, LoadedRows, TensorDifference, sqnr, tensor_difference
from bamba_quant.inference.weights import DeviceWeights, LazyWeights, Timings
from bamba_reference.config import Config
from bamba_reference.runtime.layer_passes import LayerPass
from bamba_reference.tensors import HEAD, layer_prefix, stack_of
from bamba_reference.torch.forward import Model, layer

WORST = 5
# Of a chunk, from its beginning.
TOKENS = 128

# Signal and noise of each row of a product, float64 of shape (2, rows).
Noise = NDArray[np.float64]


@dataclass
class DriftWatch:
    """Called after each ``LayerPass`` of a stream whose first source is the base; gathers ``tensors`` and ``layers``.

    ``weights`` are those of the sources, in their order, of float32 where a GPU decodes them, and compared on
    ``device``; the first ``TOKENS`` tokens of ``texts`` of the watched ones are looked at.
    """

    config: Config
    weights: Sequence[LazyWeights | DeviceWeights]
    texts: int
    timings: Timings
    device: torch.device = CPU
    tensors: list[list[TensorLoss]] = field(default_factory=list)
    layers: list[list[LayerDrift]] = field(default_factory=list)
    _base: _BaseLayer | None = None

    def __post_init__(self) -> None:
        self.tensors = [[] for _ in self.weights]
        self.layers = [[] for _ in self.weights]

    def __call__(self, passed: LayerPass) -> None:
        passed = replace(passed, sequences=passed.sequences.first(TOKENS))
        before, after = passed.before[: self.texts, :TOKENS], passed.after[: self.texts, :TOKENS]
        if passed.source == 0:
            self._base = _watch_base(passed, before, after.clone())
            return
        base = self._base
        assert base is not None
        local, noises = _watch_candidate(passed, base)
        self.layers[passed.source].append(
            LayerDrift(
                passed.layer,
                self.config.layer_types[passed.layer],
                drift(base.local.double() - base.before, local.double() - base.before),
                drift(base.after, after),
            )
        )
        prefix = layer_prefix(passed.layer)
        for name in self.weights[passed.source]:
            if name.startswith(prefix):
                loaded = (base.model, passed.model) if base.model else ()
                self._lose(passed.source, name, noises.get(name), *loaded)

    def finish(self) -> list[tuple[TensorLoss, ...]]:
        """The losses of all tensors of each source, those outside the layers added, in the model's order."""
        self._base = None
        outside = [name for name in self.weights[0] if self.weights[0].info(name).layer is None]
        # The head, which was used last, is the one that may still be there.
        for name in sorted(outside, key=lambda name: name != HEAD):
            for source in range(1, len(self.weights)):
                self._lose(source, name, None)
        found = []
        for weights, losses in zip(self.weights[1:], self.tensors[1:], strict=True):
            order = {name: place for place, name in enumerate(weights)}
            found.append(tuple(sorted(losses, key=lambda loss: order[loss.name])))
        return found

    def _lose(self, source: int, name: str, noise: Noise | None, *loaded: Model) -> None:
        """Add a tensor's loss; ``loaded`` are the layer's weights of the base and of the source, in float32."""
        weights = self.weights[0], self.weights[source]
        if loaded:
            first, other = (LoadedRows(w, m.weights[name]) for w, m in zip(weights, loaded, strict=True))
            apart = tensor_difference(first, other, name, self.timings)
        else:
            apart = tensor_difference(*weights, name, timings=self.timings, device=self.device)
        self.tensors[source].append(tensor_loss(self.weights[0], self.weights[source], name, apart, noise))


@dataclass(frozen=True)
class _BaseLayer:
    """Inputs and outputs of the base's layer, and of each of its matrices by name.

    ``after`` is from the run of all texts, ``local`` from one of the watched texts alone, whose last digits differ.
    """

    model: Model | None  # where its weights are float32 on a CPU, and are compared
    before: Tensor
    after: Tensor
    local: Tensor
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def tensor_loss(
    base: LazyWeights | DeviceWeights,
    other: LazyWeights | DeviceWeights,
    name: str,
    apart: TensorDifference,
    noise: Noise | None = None,
) -> TensorLoss:
    """The report's record of a tensor: its ``TensorDifference`` and the noise of its product."""
    info, original = other.info(name), base.info(name)
    stops = accumulate(info.row_sections.values())
    classes = tuple(
        RowClass(
            label,
            count,
            sqnr(apart.signal[stop - count : stop].sum(), apart.noise[stop - count : stop].sum()),
            sqnr(noise[0][stop - count : stop].sum(), noise[1][stop - count : stop].sum())
            if noise is not None
            else None,
        )
        for (label, count), stop in zip(info.row_sections.items(), stops, strict=True)
    )
    return TensorLoss(
        name,
        info.stored_name,
        info.layer,
        info.role,
        info.shape,
        original.format,
        info.format,
        info.n_bytes,
        apart.sqnr,
        apart.max_error,
        apart.cosine,
        sqnr(noise[0].sum(), noise[1].sum()) if noise is not None else None,
        classes,
    )


def worst(tensors: Sequence[TensorLoss]) -> tuple[str, ...]:
    """The names of the five tensors whose products lost most, by ``output_sqnr``, worst first."""
    lossy = [(loss.output_sqnr, loss.name) for loss in tensors if loss.output_sqnr is not None]
    return tuple(name for _, name in sorted(lossy)[:WORST])


def drift(base: Tensor, other: Tensor) -> float | None:
    """10 log10(Σ base² / Σ (other - base)²) in dB, float64 sums; None where nothing differs."""
    signal = base.square().sum(dtype=torch.float64)
    noise = (other - base).square().sum(dtype=torch.float64)
    return sqnr(float(signal), float(noise))


def with_linear(model: Model, linear: Callable[..., Tensor]) -> Model:
    """The model with another matrix product in its layers."""
    return replace(model, backend=model.backend.with_linear(linear))


def _watch_base(passed: LayerPass, before: Tensor, after: Tensor) -> _BaseLayer:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    usual = passed.model.backend.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        inputs[name], outputs[name] = x, usual(x, weight, bias, name)
        return outputs[name]

    local = layer(with_linear(passed.model, linear), passed.layer, before, passed.sequences)
    kept = passed.model if (passed.model.device, passed.model.dtype) == (CPU, torch.float32) else None
    return _BaseLayer(kept, before, after, local, inputs, outputs)


def _watch_candidate(passed: LayerPass, base: _BaseLayer) -> tuple[Tensor, dict[str, Noise]]:
    """The layer's output for the base's input, and the noise of each tensor's products for the base's input to them.

    Sums of a stack of experts are over the experts that the base's router chose.
    """
    noises: dict[str, Tensor] = {}
    usual = passed.model.backend.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        y = usual(x, weight, bias, name)
        if name in base.inputs:
            # After the first matrices of the layer the inputs differ, so the product is computed again.
            found = y if torch.equal(x, base.inputs[name]) else usual(base.inputs[name], weight, bias, name)
            noises[name] = torch.stack(
                [_squares(base.outputs[name]), _squares(found - base.outputs[name])]
            )  # (2, rows)
        return y

    local = layer(with_linear(passed.model, linear), passed.layer, base.before, passed.sequences)
    stacked: dict[str, Tensor] = {}
    for name, x in base.inputs.items():
        stack, expert = stack_of(name)
        if name not in noises:
            assert expert is not None
            linear(x, passed.model.weights[stack][expert], None, name)
        stacked[stack] = stacked[stack] + noises[name] if stack in stacked else noises[name]
    return local, {name: noise.cpu().numpy() for name, noise in stacked.items()}


def _squares(y: Tensor) -> Tensor:
    """Sums of squares over all tokens of each output, float64 (rows,)."""
    return y.flatten(0, -2).square().sum(0, dtype=torch.float64)
