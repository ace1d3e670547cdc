"""Model directories read back whole, by other people's code."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file

from bamba_quant.planning.plan import Plan
from tests.support.quantized import read_back

_NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as safetensors' own reader sees it."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in _NUMPY:
        raw = tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.uint8)
        return raw.numpy().view(_NUMPY[tensor.dtype])
    return tensor.numpy()


def dequantized(plan: Plan, stored: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weight of each matrix of a plan as the checkpoint's reader finds it, by its name in the original."""
    found: dict[str, np.ndarray] = {}
    for matrix in plan.matrices:
        parts = matrix.scheme.parts(*matrix.matrix)
        values = {p.suffix: to_numpy(stored[e.name]) for p, e in zip(parts, matrix.parts, strict=True)}
        found[matrix.source.name] = read_back(matrix.scheme, values, matrix.matrix)
    return found
