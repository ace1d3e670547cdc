"""Activations rounded to e2m1 in groups of columns, to the bits of compressed-tensors' ``forward_quantize``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LARGEST_SCALE = 448.0  # of e4m3
_SCALE_OF_ZEROS = 0.125  # what compressed-tensors has in place of a scale that rounds to 0


def nvfp4(x: Tensor, global_scale: float) -> Tensor:
    """x (…, columns) in groups of 16; a scale is the e4m3 nearest to ``global_scale`` times the largest over 6."""
    groups = x.unflatten(-1, (-1, 16))
    amax = groups.abs().amax(-1, keepdim=True)
    # The scale of a bfloat16 is one; the global one is float32, and so is what it multiplies.
    scale = torch.tensor([global_scale], dtype=torch.float32, device=x.device) * (
        amax / torch.full_like(amax, 6)
    )
    scale = scale.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn).to(scale.dtype)
    scale = torch.where(scale == 0, _SCALE_OF_ZEROS, scale) / global_scale
    return (_nearest(groups / scale) * scale).flatten(-2).to(x.dtype)


def mxfp4(x: Tensor, global_scale: float = 0.0) -> Tensor:
    """x (…, columns) in groups of 32 under powers of two, of which a group's largest is 3.5 to 7."""
    groups = x.float().unflatten(-1, (-1, 32))
    bits = groups.abs().amax(-1, keepdim=True).view(torch.int32)
    exponent = ((bits + (1 << 21) >> 23) - 2).clamp(0, 255) - 127
    scale = torch.pow(2.0, exponent.float())
    return (_nearest(groups / scale) * scale).flatten(-2).to(x.dtype)


def _nearest(v: Tensor) -> Tensor:
    """The e2m1 number nearest to each, half to even; beyond 6 that."""
    size = v.abs().clamp(max=6)
    spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(v.dtype)
    return torch.copysign((size / spacing).round() * spacing, v)


ROUNDED: Mapping[str, Callable[[Tensor, float], Tensor]] = {"nvfp4": nvfp4, "mxfp4": mxfp4}
