"""The CUDA twin of every writable format, in Triton: the same bytes, for numpy arrays or on the device."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from bamba_quant.codecs.base import F32, U8, Format, Quantize
from bamba_quant.errors import FormatError

if TYPE_CHECKING:
    import torch

# Offsets inside a kernel are products of 32 bits.
_MOST_WEIGHTS = 2**30


@cache
def _encoders() -> dict[str, Any]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    from bamba_quant.codecs.cuda.launch import ENCODERS

    return ENCODERS


def encode(number_format: Format, x: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """``Format.quantize`` where x lies: float32 (rows, n) and importance (n,) to uint8 (rows, row_bytes)."""
    from bamba_quant.codecs.cuda.launch import Blocks

    row_bytes = number_format.row_bytes(x.shape[1])
    if not x.numel():
        return x.new_empty((len(x), row_bytes)).byte()
    encoder = _encoders()[number_format.name]
    parts = []
    for rows in x.split(max(1, _MOST_WEIGHTS // x.shape[1])):
        out = encoder(Blocks(rows, importance, number_format.block_size))  # (block_bytes, n_blocks)
        parts.append(out.t().reshape(len(rows), row_bytes))
    import torch

    return torch.cat(parts)


def quantizer(number_format: Format) -> Quantize:
    """The twin for numpy arrays, carried there and back. Raises ``FormatError`` where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise FormatError(
            "there is no GPU to quantize on",
            expected="a CUDA device that torch sees",
            fix="use the device cpu",
        )

    def quantize(x: F32, importance: F32 | None = None) -> U8:
        rows = torch.from_numpy(np.ascontiguousarray(x)).cuda()
        weight = None if importance is None else torch.from_numpy(np.ascontiguousarray(importance)).cuda()
        encoded: U8 = encode(number_format, rows, weight).cpu().numpy()
        return encoded

    return quantize
