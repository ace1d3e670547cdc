"""The record of the Triton kernels, for ``torch_forward`` to run a model by."""

from __future__ import annotations

from dataclasses import replace

from bamba_reference.kernels import attention, convolution, elementwise, norms, products, scan
from bamba_reference.kernels.decode import Decoder
from bamba_reference.kernels.selective_scan import selective_scan
from bamba_reference.torch.backend import TORCH

TRITON = replace(
    TORCH,
    name="triton",
    linear=products.linear,
    rms_norm=norms.rms_norm,
    conv=convolution.conv,
    scan=scan.scan,
    gated_norm=norms.gated_norm,
    rotary=elementwise.rotary,
    attention=attention.attention,
    swiglu=elementwise.swiglu,
    head=products.head,
    add_norm=norms.add_norm,
    add_linear=products.add_linear,
    gate_up=products.gate_up,
    decoder=Decoder,
    arrange=products.arrange,
    selective_scan=selective_scan,
)
