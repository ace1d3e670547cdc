"""The backend of the kernels compiled for this processor, for float32 models.

Each replaces a function of ``torch.ops`` or ``torch.scan`` and calls it for what the kernel does not support: other
dtypes, tensors that need gradients, shapes that do not fit, attention of few queries, scans of few tokens, and products
of few rows or on processors without AVX-512.
"""

from __future__ import annotations

from dataclasses import replace

from bamba_reference.kernels.cpu import attention, convolution, elementwise, matmul, norms, scan, stored_state
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
    column_sums=elementwise.column_sums,
    relu2=elementwise.relu2,
    recurrence=stored_state.recurrence,
)
