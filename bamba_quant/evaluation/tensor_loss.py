"""The difference between two tensors of the same shape, in any formats, a few rows at a time.

Rows that a GPU decodes are compared there, by the same operations in the same order: figures of one device are the
same in every run, and between a GPU and a CPU the last digits of the float64 sums differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.errors import BambaQuantError
from bamba_quant.inference.weights import DeviceWeights, LazyWeights, Timings, WeightInfo
from bamba_reference.torch.forward import to_tensor

F64 = NDArray[np.float64]

# Weights that are compared at once, on a CPU and on a GPU.
_ELEMENTS = 1 << 20
_ELEMENTS_ON_GPU = 1 << 26
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TensorDifference:
    """Sums over each row of a tensor w and of ŵ: ``signal`` Σw², ``noise`` Σ(ŵ - w)², float64 of shape (rows,)."""

    signal: F64
    noise: F64
    other: float
    product: float
    max_error: float

    @property
    def sqnr(self) -> float | None:
        return sqnr(self.signal.sum(), self.noise.sum())

    @property
    def cosine(self) -> float | None:
        """Of the angle between w and ŵ as vectors; None where one of them is zero."""
        lengths = math.sqrt(float(self.signal.sum()) * self.other)
        return min(1.0, max(-1.0, self.product / lengths)) if lengths else None


@dataclass(frozen=True)
class LoadedRows:
    """A tensor's float32 values, already in memory, in place of the weights they were read from."""

    weights: LazyWeights | DeviceWeights
    values: Tensor

    def rows(self, name: str, start: int, stop: int | None, timings: Timings | None) -> Tensor:
        return self.values[start:stop]

    def info(self, name: str) -> WeightInfo:
        return self.weights.info(name)


def sqnr(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise) in dB; None without noise. A signal of 0 counts as 1e-300."""
    return 10 * math.log10(max(float(signal), 1e-300) / min(float(noise), 1e300)) if noise else None


def tensor_difference(
    base: LazyWeights | DeviceWeights | LoadedRows,
    other: LazyWeights | DeviceWeights | LoadedRows,
    name: str,
    timings: Timings | None = None,
    *,
    other_name: str | None = None,
    device: torch.device = CPU,
) -> TensorDifference:
    """Tensor ``name`` of ``other`` against that of ``base``, in float32 with sums in float64, on ``device``.

    ``DeviceWeights`` are of float32, so that blocks become what they are on a CPU. Raises ``BambaQuantError`` for
    weights that are infinite or not a number.
    """
    shape = base.info(name).shape
    together = _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_GPU
    step = max(1, together // max(1, math.prod(shape[1:]))) if len(shape) > 1 else shape[0]
    signal, noise, lengths, products, worst = [], [], 0.0, 0.0, 0.0
    for start in range(0, shape[0], step):
        w, v = (
            to_tensor(weights.rows(of, start, min(shape[0], start + step), timings), torch.float32, device).flatten(1)
            if len(shape) > 1
            else to_tensor(weights.rows(of, 0, None, timings), torch.float32, device)[:, None]
            for weights, of in ((base, name), (other, other_name or name))
        )  # fmt: skip
        d = v - w
        rows = torch.stack([_squares(w), _squares(d), _squares(v)]).cpu().numpy()
        signal.append(rows[0])
        noise.append(rows[1])
        lengths += float(rows[2].sum())
        product, greatest = torch.stack([(w * v).sum(dtype=torch.float64), d.abs().max().double()]).tolist()
        products, worst = products + product, max(worst, greatest)
    if not math.isfinite(lengths + float(sum(row.sum() for row in (*signal, *noise)))):
        finite_base = math.isfinite(sum(float(row.sum()) for row in signal))
        which, info = (
            ("candidate", other.info(other_name or name)) if finite_base else ("base", base.info(name))
        )
        raise BambaQuantError(
            f"a tensor of the {which} holds values that are not finite numbers",
            where=f"{info.name}, stored as {info.format}",
            fix="make the file again, from a checkpoint whose weights are finite",
        )
    return TensorDifference(np.concatenate(signal), np.concatenate(noise), lengths, products, worst)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, dtype=torch.float64)
