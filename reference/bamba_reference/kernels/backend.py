"""The backend of the Triton kernels."""

from __future__ import annotations

from dataclasses import replace

from bamba_reference.kernels import attention, convolution, elementwise, experts, matmul, norms, scan
from bamba_reference.kernels.decode import Decoder
from bamba_reference.kernels.selective_scan import selective_scan
from bamba_reference.torch.backend import TORCH

TRITON = replace(
    TORCH,
    name="triton",
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
    add_linear=matmul.add_linear,
    gate_up=matmul.gate_up,
    decoder=Decoder,
    arrange=matmul.arrange,
    selective_scan=selective_scan,
    relu2=elementwise.relu2,
    experts=experts.experts,
)
