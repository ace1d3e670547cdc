"""Latent codes in eight bytes a weight, with the optimizer's state, in a buffer that may move between host and GPU.

``latents.LatentMatrix`` holds 26 bytes a weight in float32, which autograd moves; this is the same matrix for models
that this does not fit beside, read and learned by the kernels of ``latent_kernels``.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bamba_quant.calibration.latent_kernels import QUARTERS, UNIT, learn_codes, make_weights
from bamba_quant.calibration.latents import LatentMatrix
from bamba_quant.calibration.optimizer import BETA1, BETA2
from bamba_reference.kernels.launch import INTERPRETED

# A matrix's arrays in the order in which they lie in a buffer; the first ``FORWARD`` make the weights, all learn.
ARRAYS = {
    "places": torch.uint8,
    "latents": torch.int16,
    "first": torch.bfloat16,
    "second": torch.uint8,
    "means": torch.int16,
}
FORWARD = ("places", "latents")
BYTES = sum(dtype.itemsize for dtype in ARRAYS.values())

# A program's rows and columns; the interpreter takes as long for many rows as for one.
_ROWS, _TILE = (128, 256) if INTERPRETED else (1, 1024)
_MOST_WIDTH = 256
_HEADROOM = 8  # powers of two that squared gradients may grow by after the first step
_ROUNDED = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Rates:
    """What a step of the optimizer needs to know: ``rate`` with the bias of both moments taken out."""

    rate: float
    eps: float
    mean_weight: float
    seed: int


class CodedMatrix(LatentMatrix):
    """A quantized tensor whose codes are learned; arguments as of ``LatentMatrix``.

    ``arrays`` are where the codes are now, on the device, by the names in ``ARRAYS``; who moves them sets it.
    Parameters are those of scales alone.
    """

    arrays: dict[str, Tensor]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lowest, self._last = self.low, self.high - self.low
        latents = self.parameters.pop("codes").detach()
        device = latents.device
        self.arrays = {
            "places": (self.start.to(torch.int16) - self.low).to(torch.uint8),
            "latents": latents.mul_(UNIT).round_().to(torch.int16),
            "first": torch.zeros(latents.shape, dtype=torch.bfloat16, device=device),
            "second": torch.zeros(latents.shape, dtype=torch.uint8, device=device),
        }
        self.arrays["means"] = self.arrays["latents"].clone()
        self._targets = None if self._order is None else self._order.argsort()
        # The logarithm of the greatest squared gradient that the second moment can hold, known after the first step.
        self.top, self._begun = torch.full((), math.nan, device=device), False
        self._fixed = None
        del self.start

    def widths(self) -> tuple[int, int]:
        """In pieces of how many weights gradients are added up, of one group each, and how many pieces a tile has."""
        width = math.gcd(self.layout.group, _MOST_WIDTH)
        if self.layout.group >= self.columns:
            width = _MOST_WIDTH
        return width, max(1, _TILE // width)

    @torch.no_grad()
    def weight(self, dtype: torch.dtype = torch.float32, mean: bool = False) -> Tensor:
        """The weights of this state, or of its running mean, in the reference's shape; without gradients."""
        latents = self.arrays["means" if mean else "latents"]
        rows, columns = latents.shape
        step, low = self._scaling()
        out = torch.empty(rows, columns, dtype=dtype, device=latents.device)
        make_weights[(-(-rows // _ROWS), -(-columns // _TILE))](
            self.arrays["places"], latents, step, low, self.table, self._targets, self._factors, out,
            rows, columns, step.shape[1], self.layout.group, self._lowest, self._last,
            UNIT=UNIT, ROUNDED=_ROUNDED[self.rounded], ROWS=_ROWS, TILE=_TILE,
        )  # fmt: skip
        return out.view(self.shape)

    def learn(self, gradient: Tensor, rates: Rates) -> None:
        """Move the codes along the gradient of the weights, and add to the gradients of ``parameters``."""
        arrays = self.arrays
        rows, columns = arrays["latents"].shape
        gradient = gradient.reshape(rows, columns)
        step, low = self._scaling()
        width, pieces = self.widths()
        if not self._begun and math.isnan(float(self.top)):
            greatest = gradient.abs().amax().float() * step.detach().abs().amax()
            for slopes in (None if self.table is None else self.table.diff(), self._factors):
                greatest = greatest if slopes is None else greatest * slopes.abs().amax()
            if not float(greatest):
                return  # nothing moves, and nothing says how large gradients will be
            self.top.copy_((2 * greatest.log2()).ceil() + _HEADROOM)
        self._begun = True
        each = -(-columns // width)
        of_steps, of_lows = torch.empty(2, rows, each, device=gradient.device)
        learn_codes[(-(-rows // _ROWS), -(-each // pieces))](
            gradient, *(arrays[name] for name in ARRAYS), step, self.table, self._targets, self._factors, self.top,
            of_steps, of_lows, rows, columns, step.shape[1], self.layout.group, self._lowest, self._last,
            self.reach, rates.rate, rates.eps, BETA1, BETA2, rates.mean_weight, rates.seed,
            UNIT=UNIT, QUARTERS=QUARTERS, ROWS=_ROWS, WIDTH=width, PIECES=pieces,
        )  # fmt: skip
        learned = [
            (part, self._by_group(sums, width, part.shape[1]))
            for part, sums in ((step, of_steps), (low, of_lows))
            if part is not None and part.requires_grad
        ]
        if learned:
            torch.autograd.backward([part for part, _ in learned], [sums for _, sums in learned])

    def _by_group(self, sums: Tensor, width: int, all_groups: int) -> Tensor:
        """Sums of pieces (rows, pieces) as sums of groups (rows, groups, 1), 0 for groups of padding."""
        each = max(1, min(self.layout.group, self.columns) // width)
        if self.layout.group >= self.columns:
            each = sums.shape[1]
        groups = -(-sums.shape[1] // each)
        padded = torch.nn.functional.pad(sums, (0, groups * each - sums.shape[1]))
        found = padded.view(len(sums), groups, each).sum(-1)
        return torch.nn.functional.pad(found, (0, all_groups - groups))[..., None]

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """Codes of the running mean, on the host, and the other parameters as they are."""
        codes = (self.arrays["means"] / UNIT).round_().to(torch.int8).cpu()
        return {"codes": codes, **super().snapshot()}
