"""The operations of the torch forward pass that a set of kernels may replace, one field each.

``TORCH`` computes them in plain torch on any device and is differentiable. A kernel backend is this record
with some fields replaced (``dataclasses.replace(TORCH, scan=…)``); each of its functions takes and returns
what the function of the same name in ``torch_ops`` or in ``selective_scan`` does, where the shapes, dtypes and
formulas are written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bamba_reference import selective_scan, torch_ops


@dataclass(frozen=True)
class Backend:
    """Which function computes each operation.

    ``linear`` and ``head`` receive the name of the tensor they multiply by, so that calibration can watch
    what enters each matrix and a quantized product can find its scales.
    """

    name: str
    linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    conv: Callable[..., Any]
    scan: Callable[..., Any]
    gated_norm: Callable[..., Any]
    rotary: Callable[..., Any]
    attention: Callable[..., Any]
    swiglu: Callable[..., Any]
    head: Callable[..., Any]
    selective_scan: Callable[..., Any] = selective_scan.selective_scan


TORCH = Backend(
    name="torch",
    linear=torch_ops.linear,
    rms_norm=torch_ops.rms_norm,
    conv=torch_ops.conv,
    scan=torch_ops.scan,
    gated_norm=torch_ops.gated_norm,
    rotary=torch_ops.rotary,
    attention=torch_ops.attention,
    swiglu=torch_ops.swiglu,
    head=torch_ops.head,
)
