"""The recurrences token by token, with the state rounded to a narrower type after each of them, as decoding stores it.

The output of a token reads its state before the rounding, and the next token the rounded one: so do the kernels of
runtimes (mamba_ssm/ops/triton/selective_state_update.py). The tail of the convolution keeps the activations' type.

A type of 8 bits has a float32 scale for each row of N states, which share a head and a channel, as vLLM's pull request
40012 stores them: the row's largest number becomes the type's largest. "fp8-unscaled" casts instead (pull request
26301). Stochastic rounding is up with the probability of the fraction that rounding cuts off. Runtimes draw from
Philox; here the draw is a hash of seed, layer, text, token and place (Appleby's MurmurHash3, ``fmix32``), so it does
not depend on chunks, batches, threads or kernels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_reference.errors import BambaQuantError, did_you_mean
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments

if TYPE_CHECKING:
    from bamba_reference.torch.backend import Backend

_MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
LEAST_SCALED = 1e-30  # a row of smaller numbers becomes zeros: its scale has no inverse in float32


@dataclass(frozen=True)
class StateType:
    """Numbers with ``digits`` binary digits behind the first one; ``most`` is the largest.

    Below ``least``, the smallest normal number, they are as far apart as there, and above ``largest_power`` too.
    What is above ``most`` becomes ``overflow``, by its absolute value.
    """

    digits: int
    least: float
    largest_power: float
    most: float
    overflow: float = inf
    scaled: bool = False


_E4M3 = (3, 2.0**-6, 2.0**8, 448.0, 448.0)
STATE_TYPES = {
    "bf16": StateType(
        7, 2.0**-126, 2.0**126, 255 * 2.0**120
    ),  # 2^127 has no inverse that is a normal float32
    "fp16": StateType(10, 2.0**-14, 2.0**15, 65504.0),
    "fp8": StateType(*_E4M3, scaled=True),
    "fp8-unscaled": StateType(*_E4M3),
    "int8": StateType(0, 1.0, 1.0, 127.0, 127.0, scaled=True),
}
_STOCHASTIC = "-stochastic"
STATE_NAMES = ("f32", *STATE_TYPES, *(name + _STOCHASTIC for name in STATE_TYPES))


@dataclass(frozen=True)
class StateRounding:
    """How states are rounded: to the nearest number of ``type``, ties to even, or with a ``seed`` stochastically."""

    type: StateType
    seed: int | None = None

    def __call__(self, h: Tensor, keys: Tensor, token: int) -> Tensor:
        """States (b, H, P, N) after the token number ``token`` as they are stored; ``keys`` (b,) are ``text_keys``."""
        kind, scale = self.type, None
        x = h
        if kind.scaled:
            greatest = h.abs().amax(-1, keepdim=True)  # (b, H, P, 1)
            fits = greatest > LEAST_SCALED
            x = h * torch.where(fits, kind.most / greatest, 0)
            scale = torch.where(fits, greatest / kind.most, 0)
        _, exponent = torch.frexp(x)
        power = torch.ldexp(torch.ones_like(x), exponent - 1).clamp(kind.least, kind.largest_power)
        steps = x.abs() / power * 2**kind.digits
        if self.seed is None:
            steps = steps.round()
        else:
            whole = steps.floor()
            steps = whole + (steps - whole >= _thresholds(keys, token, h.shape).to(h.dtype))
        y = steps * (power / 2**kind.digits)
        y = torch.where(y > kind.most, kind.overflow, y).copysign(x)
        return y if scale is None else y * scale


def state_rounding(name: str, seed: int) -> StateRounding | None:
    """The rounding called ``name``, such as "fp16-stochastic"; None for "f32".

    Raises ``BambaQuantError`` for a name that is not in ``STATE_NAMES``.
    """
    if name not in STATE_NAMES:
        raise BambaQuantError(
            f"unknown type of the recurrent state{did_you_mean(name, STATE_NAMES)}",
            found=name,
            expected=", ".join(STATE_NAMES),
        )
    if name == "f32":
        return None
    return StateRounding(
        STATE_TYPES[name.removesuffix(_STOCHASTIC)], seed if name.endswith(_STOCHASTIC) else None
    )


def text_keys(rounding: StateRounding, layer: str, first: int, count: int) -> Tensor:
    """A number below 2^32 for each of ``count`` texts, of which ``first`` is the first one's number: (count,) int64.

    ``layer`` is what the layer's tensor names begin with.
    """
    return torch.tensor(
        [zlib.crc32(f"{rounding.seed} {layer} {first + i}".encode()) for i in range(count)], dtype=torch.int64
    )


def _mixed(x: Tensor) -> Tensor:
    """``fmix32`` of numbers below 2^32, int64; products overflow above the 32 bits that are kept."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & _MASK
    x = ((x ^ x >> 13) * 0xC2B2AE35) & _MASK
    return x ^ x >> 16


def _thresholds(keys: Tensor, token: int, shape: torch.Size) -> Tensor:
    """Multiples of 2^-24 above 0 and up to 1, (b, H, P, N): a fraction that reaches its threshold is rounded up."""
    _, H, P, N = shape
    rows = torch.arange(H * P, device=keys.device).view(H, P, 1) + token * H * P
    keys = _mixed(_mixed(rows & _MASK) ^ keys[:, None, None, None])  # (b, H, P, 1)
    drawn = _mixed(keys + torch.arange(N, device=keys.device) * GOLDEN & _MASK)
    return ((drawn >> 8) + 1).double() * 2.0**-24


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    sequence_starts: Tensor | None,
    rounding: StateRounding,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """y = C h of each token, (b, L, H, P), and the state after the last; h = exp(dt A) h + dt x ⊗ B, then rounded.

    x (b, L, H, P), dt (b, L, H) discretized, A (H, 1 or N), B and C (b, L, G, N), h (b, H, P, N), all wide;
    ``sequence_starts`` (b, L) begins with zeros.
    """
    heads = x.shape[2] // B.shape[2]
    keys = keys.to(x.device)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)  # (b, H, 1 or N)
        if sequence_starts is not None:
            decay = decay * ~sequence_starts[:, t, None, None]
        now_B, now_C = (v[:, t].repeat_interleave(heads, 1)[:, :, None] for v in (B, C))  # (b, H, 1, N)
        h = h * decay[:, :, None] + (x[:, t] * dt[:, t, :, None])[..., None] * now_B
        outputs.append((h * now_C).sum(-1))
        h = rounding(h, keys, t)
    return torch.stack(outputs, dim=1), h


def rounded_scan(
    ops: Backend, layer: str, first_text: int, arguments: ScanArguments
) -> tuple[Tensor, Tensor]:
    """``torch.scan.scan`` with ``ops.state_rounding`` after each token."""
    x, dt, A_log, B, C, D, dt_bias, dt_limit, h, _, sequence_starts, real = arguments
    assert ops.state_rounding is not None
    x, B, C = x.to(h.dtype), B.to(h.dtype), C.to(h.dtype)
    dt = F.softplus(dt.to(h.dtype) + dt_bias.to(h.dtype)).clamp(*dt_limit)  # (b, L, H)
    if real is not None:
        dt = dt * real[..., None]
    A = -torch.exp(A_log.to(h.dtype))[:, None]
    keys = text_keys(ops.state_rounding, layer, first_text, len(x))
    y, h = ops.recurrence(x, dt, A, B, C, h, sequence_starts, ops.state_rounding, keys)
    return torch.addcmul(y, x, D.to(h.dtype)[:, None]), h


def rounded_selective_scan(
    ops: Backend, layer: str, first_text: int, arguments: SelectiveScanArguments
) -> tuple[Tensor, Tensor]:
    """``torch.scan.selective_scan`` with ``ops.state_rounding`` after each token: heads of one channel."""
    x, dt, A_log, B, C, D, z, dt_bias, h, _, sequence_starts, real = arguments
    assert ops.state_rounding is not None
    x, B, C = x.to(h.dtype), B.to(h.dtype), C.to(h.dtype)
    dt = F.softplus(dt.to(h.dtype) + dt_bias.to(h.dtype))  # (b, L, I)
    if real is not None:
        dt = dt * real[..., None]
    A, keys = -torch.exp(A_log.to(h.dtype)), text_keys(ops.state_rounding, layer, first_text, len(x))
    y, h = ops.recurrence(
        x[..., None], dt, A, B[:, :, None], C[:, :, None], h[:, :, None], sequence_starts,
        ops.state_rounding, keys,
    )  # fmt: skip
    y = torch.addcmul(y[..., 0], x, D.to(h.dtype)) * F.silu(z.to(h.dtype))
    return y.to(z.dtype), h[:, :, 0]
