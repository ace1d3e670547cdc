"""A model's parts that are in memory together, and where their arrays lie: the original's weights, the student's codes.

A unit is the embedding, a layer, or the head with the norm before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bamba_quant.calibration.coded_latents import ARRAYS, FORWARD, CodedMatrix
from bamba_quant.calibration.residence import Part, Residence, places_of
from bamba_quant.inference.loading import LoadedModel
from bamba_quant.inference.weights import weights_on
from bamba_reference.config import Config
from bamba_reference.tensors import EMBEDDING, FINAL_NORM, head_name, layer_prefix, tensor_shapes
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.forward import Model, default_chunk, stored_dtype, to_tensor

DTYPE = torch.bfloat16

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Placed:
    """Where an array lies in a buffer."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + n_bytes].view(self.dtype).view(self.shape)


def backends(device: torch.device) -> tuple[Backend, Backend]:
    """Without gradients, and with: Triton's kernels on a GPU."""
    if device.type == "cpu":
        return TORCH, TORCH
    from bamba_reference.kernels.backend import TRITON
    from bamba_reference.kernels.backward.backend import TRITON_GRADIENTS

    return TRITON, TRITON_GRADIENTS


def units_of(config: Config) -> list[list[str]]:
    """The tensors that are in memory together: the embedding, each layer, the head with the norm before it."""
    names = list(tensor_shapes(config))
    last = [FINAL_NORM, *({head_name(config)} - {EMBEDDING})]
    prefixes = [layer_prefix(i) for i in range(config.num_hidden_layers)]
    return [[EMBEDDING], *([name for name in names if name.startswith(p)] for p in prefixes), last]


def _places(arrays: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict[str, Placed], int]:
    """Where arrays of these dtypes and shapes lie in a buffer, and how many bytes it has."""
    starts, size = places_of([math.prod(shape) * dtype.itemsize for dtype, shape in arrays.values()])
    placed = zip(arrays.items(), starts, strict=True)
    return {name: Placed(start, dtype, shape) for (name, (dtype, shape)), start in placed}, size


class Original:
    """The original's weights in bfloat16, a unit of ``units_of`` at a time."""

    def __init__(self, source: LoadedModel, device: torch.device, on_host: bool) -> None:
        self.config = source.config
        self._residence, self._placed = Residence(device, on_host), list[dict[str, Placed]]()
        weights, shapes = weights_on(source.weights, device, DTYPE), tensor_shapes(source.config)
        for names in units_of(source.config):
            placed, size = _places({name: (stored_dtype(name, DTYPE), shapes[name]) for name in names})
            home = self._residence.add(size)
            for name, at in placed.items():
                at.of(home).copy_(to_tensor(weights[name], at.dtype, device))
            self._placed.append(placed)

    def weights(self, number: int, then: int | None) -> Weights:
        following: Part | None = None if then is None else (then, len(self._residence.homes[then]))
        buffer = self._residence.take(number, then=following)
        return {name: at.of(buffer) for name, at in self._placed[number].items()}

    def close(self) -> None:
        """Let the weights go."""
        self._residence.close()

    def model(self) -> Model:
        """All of it at once: views of the buffers, wherever these are."""
        weights: Weights = {}
        for home, placed in zip(self._residence.homes, self._placed, strict=True):
            weights |= {name: at.of(home) for name, at in placed.items()}
        device = self._residence.homes[0].device
        return Model(self.config, weights, DTYPE, device, backends(device)[0], default_chunk(device))


class Codes:
    """The arrays of ``CodedMatrix`` in buffers, a unit at a time."""

    def __init__(self, target: LoadedModel, device: torch.device, on_host: bool) -> None:
        self.residence = Residence(device, on_host)
        self._placed: list[dict[str, Placed]] = []
        self._unit: dict[str, int] = {}
        self._forward: list[int] = []
        self._fixed: list[int] = []  # how many of the first bytes nothing changes
        self.matrices: list[list[CodedMatrix]] = []
        for number, names in enumerate(units_of(target.config)):
            tensors = {name: target.weights.stored(name)[0] for name in names}
            coded = {
                name: (tensor.rows, tensor.columns)
                for name, tensor in tensors.items()
                if tensor.format.fields is not None
            }
            arrays = {
                f"{name}:{array}": (dtype, shape)
                for array, dtype in ARRAYS.items()
                for name, shape in coded.items()
            }
            placed, size = _places(arrays)
            self.residence.add(size)
            self._placed.append(placed)
            self._unit |= dict.fromkeys(coded, number)
            after = [at.start for name, at in placed.items() if name.rpartition(":")[2] not in FORWARD]
            changing = [at.start for name, at in placed.items() if not name.endswith(":places")]
            self._forward.append(min(after, default=0))
            self._fixed.append(min(changing, default=0))
            self.matrices.append([])

    def matrix(self, *arguments: Any) -> CodedMatrix:
        """``CodedMatrix`` of these arguments, whose arrays are moved to their home."""
        made = CodedMatrix(*arguments)
        number = self._unit[made.name]
        self._use(made, number, self.residence.homes[number], copy=True)
        self.matrices[number].append(made)
        return made

    def take(self, number: int, then: int | None, *, whole: bool) -> list[CodedMatrix]:
        """The matrices of a unit, on the device: whole, or only what makes their weights."""

        def part(unit: int) -> Part:
            return unit, len(self.residence.homes[unit]) if whole else self._forward[unit]

        buffer = self.residence.take(*part(number), then=None if then is None else part(then))
        for matrix in self.matrices[number]:
            self._use(matrix, number, buffer)
        return self.matrices[number]

    def give_back(self, number: int) -> None:
        """Keep what the matrices of a unit that was taken whole have learned."""
        self.residence.give_back(number, self._fixed[number])

    def changing(self) -> list[Tensor]:
        """What is learned, of each unit, where it is at home."""
        return [home[fixed:] for home, fixed in zip(self.residence.homes, self._fixed, strict=True)]

    def _use(self, matrix: CodedMatrix, number: int, buffer: Tensor, copy: bool = False) -> None:
        for array in ARRAYS:
            at = self._placed[number][f"{matrix.name}:{array}"]
            if at.start < len(buffer):
                if copy:
                    at.of(buffer).copy_(matrix.arrays[array])
                matrix.arrays[array] = at.of(buffer)
