"""The record of the kernels compiled for this processor, for ``torch.forward`` to run a float32 model by.

Each is a function of ``torch.ops``, and calls it for what it does not compute itself: other dtypes, tensors whose
gradients are wanted, shapes that do not fit, attention of few queries, scans of few tokens, and products of few rows
or on processors without AVX-512.
"""

from __future__ import annotations

from dataclasses import replace

from bamba_reference.kernels.cpu import attention, convolution, elementwise, matmul, norms, scan
from bamba_reference.torch.backend import TORCH

NUMBA = replace(
    TORCH,
    name="numba",
    linear=matmul.linear,
    rms_norm=norms.rms_norm,
    conv=convolution.conv,
    scan=scan.scan,
    gated_norm=norms.gated_norm,
    rotary=elementwise.rotary,
    attention=attention.attention,
    swiglu=elementwise.swiglu,
    head=matmul.head,
    add_norm=norms.add_norm,
)
