"""The backend of the Triton kernels, which has gradients where an argument wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bamba_reference.kernels import convolution, elementwise, experts, matmul, norms, scan
from bamba_reference.kernels.backward.backend import TRITON_GRADIENTS
from bamba_reference.kernels.backward.products import add_linear, gate_up
from bamba_reference.kernels.decode import Decoder
from bamba_reference.kernels.selective_scan import selective_scan
from bamba_reference.torch.blocks import each_expert


@dataclass(frozen=True)
class Differentiable:
    """``kernel``, or ``gradients`` where an argument wants a gradient, because results of a kernel have none."""

    kernel: Callable[..., Any]
    gradients: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and _wants_gradient(arguments):
            return self.gradients(*arguments, **options)
        return self.kernel(*arguments, **options)


def _wants_gradient(arguments: Iterable[Any]) -> bool:
    return any(
        each.requires_grad if isinstance(each, Tensor) else isinstance(each, tuple) and _wants_gradient(each)
        for each in arguments
    )


_KERNELS: dict[str, Any] = {
    "linear": matmul.linear,
    "rms_norm": norms.rms_norm,
    "conv": convolution.conv,
    "scan": scan.scan,
    "gated_norm": norms.gated_norm,
    "rotary": elementwise.rotary,
    "swiglu": elementwise.swiglu,
    "head": matmul.head,
    "add_norm": norms.add_norm,
    "add_linear": matmul.add_linear,
    "gate_up": matmul.gate_up,
    "selective_scan": selective_scan,
    "relu2": elementwise.relu2,
    "experts": experts.experts,
}
# What stands for the operations that ``TRITON_GRADIENTS`` leaves to ``torch.forward``.
_COMPOSED: dict[str, Any] = {
    "add_linear": add_linear,
    "gate_up": gate_up,
    "experts": partial(each_expert, TRITON_GRADIENTS),
}
_OPERATIONS: dict[str, Any] = {
    name: Differentiable(kernel, vars(TRITON_GRADIENTS)[name] or _COMPOSED[name])
    for name, kernel in _KERNELS.items()
}

TRITON = replace(TRITON_GRADIENTS, decoder=Decoder, arrange=matmul.arrange, **_OPERATIONS)
