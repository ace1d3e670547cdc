"""The operations of the torch forward pass that a set of kernels may replace, one field each.

``TORCH`` computes them in plain torch on any device and is differentiable. A kernel backend is this record
with some fields replaced (``dataclasses.replace(TORCH, scan=…)``). Its functions have the arguments and results of
those of the same name in ``torch.ops`` or ``torch.scan``, which document shapes, dtypes and formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F  # noqa: N812

from bamba_reference.errors import BambaQuantError
from bamba_reference.torch import ops as torch_ops
from bamba_reference.torch.scan import scan, selective_scan
from bamba_reference.torch.stored_state import StateRounding, recurrence


class BackendError(BambaQuantError):
    """A backend that does not exist, is not installed, or does not support the device or dtype."""


@dataclass(frozen=True)
class Backend:
    """Which function computes each operation.

    ``linear`` and ``head`` receive the name of the tensor they multiply by, so that calibration can observe each
    matrix's input and a quantized product can find its scales.

    The last entries fuse operations; where one is None, ``torch.forward`` composes it from the others.
    ``add_norm(x, delta, weight, eps)`` returns x + delta and its rms_norm; ``add_linear(x, y, weight, bias, name,
    multiplier)`` returns x + linear(y, …) * multiplier and may overwrite x; ``gate_up(x, gate, up, multiplier)``, gate
    and up each (weight, bias, name), returns swiglu of the two products.
    ``experts(x, chosen, weights, gate, up, down)`` returns the weighted sum of each token's experts, wide: x (T, d),
    chosen and weights (T, k), stacks of matrices of which ``gate`` may be None. ``next_tail(tail, xBC)`` returns the
    inputs of a convolution that the next call needs. ``decoder(model, state, room)`` continues from a state as
    ``kernels.decode.Decoder`` does.
    ``arrange(weights)`` puts a model's weights into the memory order that the products read. ``parallel`` says whether
    its functions may run in several threads at a time.

    ``cached(k, v, layer)`` returns keys and values (B, L, kv, E) as a cache stores them; ``layer`` is what the layer's
    tensor names begin with. With ``state_rounding`` the recurrences run token by token, by ``recurrence``.
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
    add_norm: Callable[..., Any] | None = None
    add_linear: Callable[..., Any] | None = None
    gate_up: Callable[..., Any] | None = None
    experts: Callable[..., Any] | None = None
    next_tail: Callable[..., Any] = torch_ops.next_tail
    decoder: Callable[..., Any] | None = None
    arrange: Callable[..., Any] = dict
    selective_scan: Callable[..., Any] = selective_scan
    embedding: Callable[..., Any] = F.embedding
    column_sums: Callable[..., Any] = torch_ops.column_sums
    relu2: Callable[..., Any] = torch_ops.relu2
    parallel: bool = True
    cached: Callable[..., Any] | None = None
    state_rounding: StateRounding | None = None
    recurrence: Callable[..., Any] = recurrence

    def with_linear(self, linear: Callable[..., Any], **others: Any) -> Backend:
        """The same with ``linear`` for every product in a layer, and ``others`` replacing other fields."""
        return replace(self, linear=linear, add_linear=None, gate_up=None, experts=None, **others)


TORCH = Backend(
    name="torch",
    linear=torch_ops.linear,
    rms_norm=torch_ops.rms_norm,
    conv=torch_ops.conv,
    scan=scan,
    gated_norm=torch_ops.gated_norm,
    rotary=torch_ops.rotary,
    attention=torch_ops.attention,
    swiglu=torch_ops.swiglu,
    head=torch_ops.head,
)
