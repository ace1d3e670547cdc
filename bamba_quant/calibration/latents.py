"""Quantized tensors as numbers that can be learned: latent codes that round to the file's codes, and scales.

Codes are counted along the sorted values of their grid, so that a step is from one value to the next whether a grid
is even (K-quants, integers) or not (IQ4, MXFP4, e4m3). A latent code is an offset from the file's code: it starts at
the fraction that rounding took from the original's weight, within half a step, so that rounding gives the file back.
Rounding passes gradients straight through.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.calibration.straight_through import (
    by_group,
    clamp_sum,
    codes_of,
    interpolated,
    looked_up,
    narrowed,
    rounded,
    sorted_table,
)
from bamba_quant.checkpoint import StoredTensor, packed_like
from bamba_quant.checkpoint.base import read_raw
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.fields import Fields
from bamba_quant.families import TensorRule
from bamba_quant.families.transforms import IDENTITY, Transform
from bamba_reference.torch.forward import to_tensor

Reference = NDArray[Any]  # a tensor as the reference shapes it

_MOST_SCALE_STEPS = 31.0
_TOGETHER = 1 << 26  # weights of a tensor whose offsets are computed together


class LatentTensor(ABC):
    """A tensor of the model that is learned: ``parameters`` by what they are, ``weight`` as the reference has it."""

    name: str
    tensor: StoredTensor
    parameters: dict[str, Tensor]

    @abstractmethod
    def weight(self) -> Tensor:
        """The tensor of this state, differentiable, in the reference's shape."""

    @abstractmethod
    def clamp(self) -> None:
        """Bring the parameters back to where they may be, after a step."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """What ``raw`` needs of this state, as it would be stored, copied."""

    @abstractmethod
    def raw(self, found: dict[str, Tensor]) -> U8:
        """The rows of a snapshot as the format takes them, uint8 (rows, ``row_bytes``)."""


class LatentMatrix(LatentTensor):
    """A quantized tensor. ``original`` has the weights it was made from, in the reference's shape, ``fields`` what its
    bytes hold.

    What is in ``train`` is learned: "codes", "scales" (integers of groups), "blocks" (floats of blocks).
    """

    def __init__(self, tensor: StoredTensor, rule: TensorRule, moved: bool, original: Reference | Tensor,
                 fields: Fields, train: tuple[str, ...], reach: float, device: torch.device) -> None:  # fmt: skip
        layout = tensor.format.fields
        assert layout is not None
        self.name, self.tensor, self.layout, self.shape = rule.name, tensor, layout, rule.shape
        self.reach, self.columns = reach, tensor.columns
        self._order, self._factors = _inverse(rule.transform if moved else IDENTITY, tensor.rows, device)
        self._table, self._places = sorted_table(layout)
        codes = fields.codes[:, : self.columns]
        start = codes if self._places is None else self._places[codes]
        self.low, self.high = layout.codes if self._table is None else (0, len(self._table) - 1)
        self.start = torch.from_numpy(np.ascontiguousarray(start)).to(device)
        self.table = None if self._table is None else torch.from_numpy(self._table).to(device)

        def put(part: NDArray[Any] | None) -> Tensor | None:
            return None if part is None else torch.from_numpy(part).to(device)

        def floats(part: NDArray[Any] | None) -> Tensor | None:
            return None if part is None else put(part.astype(np.float32))

        self.d, self.dmin = floats(fields.d), floats(fields.dmin)
        self.scales, self.minima = put(fields.scales), put(fields.minima)
        self.float_type = getattr(torch, _float_type(tensor))
        self.rounded = {"bf16": torch.bfloat16, "f16": torch.float16}.get(layout.rounded)
        self.parameters = {}
        self.count, self.learns_codes = self.start.numel(), "codes" in train
        if self.learns_codes:
            self.parameters["codes"] = _fraction(self, original)
        if "scales" in train and self.scales is not None:
            self.parameters["scales"] = torch.zeros(self.scales.shape, device=device)
        if "scales" in train and self.minima is not None and self.dmin is not None:
            self.parameters["minima"] = torch.zeros(self.minima.shape, device=device)
        if "blocks" in train and _own_scales(tensor) and tensor.format.name != "mxfp4":
            self.parameters["d"] = torch.zeros_like(self.d)
            if self.dmin is not None and tensor.format.ggml_type >= 0:
                self.parameters["dmin"] = torch.zeros_like(self.dmin)
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self._fixed = None if {"scales", "minima", "d", "dmin"} & self.parameters.keys() else self._scaling()

    @property
    def bits(self) -> float:
        """How many bits a code has."""
        return float(np.log2(self.high - self.low + 1))

    def _integers(self, name: str, start: Tensor | None) -> Tensor | None:
        offset = self.parameters.get(name)
        return start if start is None or offset is None else start + rounded(offset)  # float32

    def _floats(self, name: str, start: Tensor | None) -> Tensor | None:
        relative = self.parameters.get(name)
        if start is None or relative is None:
            return start
        return narrowed(start + start * relative, self.float_type)

    def _scaling(self) -> tuple[Tensor, Tensor | None]:
        """Step and low, (rows, groups, 1)."""
        each = self.layout.block // self.layout.group
        d, dmin = self._floats("d", self.d), self._floats("dmin", self.dmin)
        scales, minima = self._integers("scales", self.scales), self._integers("minima", self.minima)
        assert d is not None
        d = d.repeat_interleave(each, dim=1) if each > 1 else d
        step = d if scales is None else d * scales
        if dmin is None and minima is None:
            return step[..., None], None
        low = d if dmin is None else dmin.repeat_interleave(each, dim=1) if each > 1 else dmin
        return step[..., None], (low if minima is None else low * minima)[..., None]

    def weight(self) -> Tensor:
        offset = self.parameters.get("codes")
        if offset is None:
            start = self.start.to(torch.float32)
            values = start if self.table is None else self.table[self.start.long()]
        elif self.table is None:
            values = self.start + rounded(offset)
        else:
            values = looked_up(offset, self.start, self.table)
        step, low = self._fixed or self._scaling()
        w = by_group(values, step, low, self.layout.group, self.columns)
        if self.rounded is not None:
            w = narrowed(w, self.rounded)
        if self._order is not None:
            w = w.index_select(0, self._order)
        if self._factors is not None:
            w = w * self._factors
        return w.reshape(self.shape)

    @torch.no_grad()
    def clamp(self) -> None:
        for name, parameter in self.parameters.items():
            if name == "codes":
                parameter.clamp_(-self.reach, self.reach)
                clamp_sum(parameter, self.start, (self.low, self.high))
            elif name in ("scales", "minima"):
                parameter.clamp_(-_MOST_SCALE_STEPS, _MOST_SCALE_STEPS)
                clamp_sum(parameter, getattr(self, name), getattr(self.layout, name))

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.parameters.items():
            if name in ("d", "dmin"):
                floats = self._floats(name, getattr(self, name))
                assert floats is not None
                found[name] = floats
            else:
                found[name] = parameter.round().to(torch.int8)
        return found

    def raw(self, found: dict[str, Tensor]) -> U8:
        fields = self.layout.unpack(read_raw(self.tensor))
        parts: dict[str, NDArray[Any]] = {}
        for name, values in found.items():
            array, before = values.cpu().numpy(), getattr(fields, name)
            if name in ("d", "dmin"):
                parts[name] = array.astype(before.dtype)
            elif name == "codes":
                parts[name] = self._codes(before, array)
            else:
                parts[name] = (before.astype(np.int16) + array).astype(before.dtype)
        return self.layout.pack(replace(fields, **parts))

    def _codes(self, before: NDArray[Any], moved: NDArray[np.int8]) -> NDArray[Any]:
        """Codes of the file, each so many steps further; one that did not move stays as it is, also if its value has
        several codes.
        """
        codes = before.copy()
        inside = codes[:, : self.columns]
        if self._table is None or self._places is None:
            inside += moved.astype(codes.dtype)
        else:
            places = self._places[inside] + moved
            inside[:] = np.where(moved == 0, inside, codes_of(self.layout, self._table)[places])
        return codes

    def changed(self, found: dict[str, Tensor]) -> int:
        """How many codes of a snapshot are not the file's."""
        return int((found["codes"] != 0).sum()) if "codes" in found else 0


class LatentVector(LatentTensor):
    """A tensor stored in float32: what is learned is its offset, in multiples of its mean magnitude."""

    def __init__(self, tensor: StoredTensor, rule: TensorRule, moved: bool, stored: U8, value: Reference,
                 device: torch.device) -> None:  # fmt: skip
        self.name, self.tensor, self._rule, self._moved, self._stored = rule.name, tensor, rule, moved, stored
        self.start = torch.from_numpy(np.array(value, np.float32)).to(device)
        self.size = float(self.start.abs().mean()) or 1.0
        self.parameters = {"floats": torch.zeros_like(self.start).requires_grad_()}

    def weight(self) -> Tensor:
        return self.start + self.parameters["floats"] * self.size

    def clamp(self) -> None:
        """A float may be anywhere."""

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        return {"floats": self.weight()}

    def raw(self, found: dict[str, Tensor]) -> U8:
        values: F32 = found["floats"].cpu().numpy()
        shape = (-1, 1) if len(self._rule.shape) == 1 else (self.tensor.rows, self.tensor.columns)
        rows = values.reshape(shape)
        unmoved = self.start.cpu().numpy().reshape(shape)
        stored = self._stored.view(np.float32).reshape(shape)
        if self._moved:
            rows, unmoved = (self._rule.transform.apply(each, 0) for each in (rows, unmoved))
        # A number that was not learned keeps its bits, whatever its transform does to the last of them.
        rows = np.where(rows == unmoved, stored, rows).astype(np.float32)
        return rows.reshape(self._stored.shape[0], -1).view(np.uint8)


def _inverse(transform: Transform, rows: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """How stored rows become the reference's: their order (rows,) and then their factors (rows, 1), or None."""
    order = factors = None
    if transform.row_order is not None:
        numbers = np.arange(rows, dtype=np.int64).reshape(-1, 1)
        moves = replace(transform, row_factors=None)
        order = torch.from_numpy(moves.invert(numbers, 0).ravel()).to(device)
    if transform.row_factors is not None:
        factors = torch.from_numpy(transform.invert(np.ones((rows, 1), np.float32), 0)).to(device)
    return order, factors


@torch.no_grad()
def _fraction(matrix: LatentMatrix, original: Reference | Tensor) -> Tensor:
    """The offsets that latent codes start at, (rows, columns) float32, within half a step of the file's codes."""
    step, low = matrix._scaling()
    device, (rows, columns), group = step.device, matrix.start.shape, matrix.layout.group
    reference = to_tensor(original, torch.float32, device).reshape(rows, columns)
    order = torch.arange(rows, device=device) if matrix._order is None else matrix._order.argsort()
    found = torch.empty(rows, columns, device=device)
    for first in range(0, rows, each := max(1, _TOGETHER // columns)):
        now = slice(first, first + each)  # of the file's rows
        w = reference[order[now]]
        if matrix._factors is not None:
            w = w / matrix._factors[order[now]]
        steps = step[now].repeat_interleave(group, 1)[:, :columns, 0]
        if low is not None:
            w = w + low[now].repeat_interleave(group, 1)[:, :columns, 0]
        place = w / steps
        if matrix.table is not None:
            place = interpolated(place, matrix.table)
        offset = (place - matrix.start[now]).clamp_(-0.5, 0.5)
        found[now] = torch.where((steps != 0) & offset.isfinite(), offset, 0)
    return found


def _own_scales(tensor: StoredTensor) -> bool:
    """Whether no two rows share a scale, and a float of the file is one."""
    packed = packed_like(tensor)
    return packed is None or (packed.scale.rows == 1 and packed.scale.pack is None)


def _float_type(tensor: StoredTensor) -> str:
    """torch's name of the type in which the floats of blocks are stored."""
    packed = packed_like(tensor)
    if packed is not None:
        return {"bf16": "bfloat16", "f16": "float16"}.get(packed.scale.tensor.format.name, "float32")
    return "float16"
