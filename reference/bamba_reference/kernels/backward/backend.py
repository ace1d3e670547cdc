"""The operations of the Triton backend with gradients; each takes what the one without takes."""

from __future__ import annotations

from dataclasses import replace

from bamba_reference.kernels import attention
from bamba_reference.kernels.backward import convolution, elementwise, norms, products
from bamba_reference.kernels.backward.scan import scan
from bamba_reference.kernels.backward.selective_scan import selective_scan
from bamba_reference.torch.backend import TORCH

# Products are torch's own, and ``torch.forward`` composes what is fused without gradients. torch's attention has a
# backward pass that holds no scores, for grouped queries too.
TRITON_GRADIENTS = replace(
    TORCH,
    name="triton",
    rms_norm=norms.rms_norm,
    conv=convolution.conv,
    scan=scan,
    gated_norm=norms.gated_norm,
    rotary=elementwise.rotary,
    attention=attention.attention,
    swiglu=elementwise.swiglu,
    head=products.head,
    add_norm=norms.add_norm,
    selective_scan=selective_scan,
    relu2=elementwise.relu2,
)
