"""Mamba's recurrence in plain torch (Gu and Dao 2023, 2312.00752): any device, any float dtype, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_reference.torch.chunking import pieces

# Elements of the (tokens, I, N) decays of a piece that are worked on at once: 2 MB stay in a CPU core's cache, and a
# device with its own memory runs faster the fewer steps there are.
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 1 << 19, 1 << 26


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    h: Tensor,
    chunk: int,
    sequence_starts: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h = exp(dt A) h + dt x (outer) B, y = (h C + D x) silu(z): y (B, L, I) in z's dtype, and h after the last token.

    x, raw dt and z (B, L, I), B and C (B, L, N), A_log (I, N), D and dt_bias (I,), h (B, I, N) wide. dt =
    softplus(dt + dt_bias), A = -exp(A_log). ``chunk`` tokens are run one after the other, as many chunks as fit
    side by side. ``sequence_starts`` (B, L): tokens that begin a packed sequence. ``real`` (B, L): false at padding,
    which leaves the state as it is.
    """
    dtype = h.dtype
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))  # (B, L, I)
    if real is not None:
        dt = dt * real[..., None]
    A = -torch.exp(A_log.to(dtype))  # (I, N)
    most = (_CPU_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS) // (h.numel() * chunk)
    outputs = []
    for start, stop, q in pieces(x.shape[1], chunk, most):
        now = slice(start, stop)
        starts = None if sequence_starts is None else sequence_starts[:, now]
        y, h = _scan_chunks(x[:, now], dt[:, now], A, B[:, now], C[:, now], h, q, starts)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return (torch.addcmul(y, x, D.to(dtype)) * F.silu(z.to(dtype))).to(z.dtype), h


def _scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, q: int, sequence_starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and h C over c whole chunks of q tokens, the first of which begins with h and the others with nothing.

    What these should have begun with follows from chunk to chunk and is added, decayed, to their outputs.
    """
    b, (inner, N) = len(x), A.shape
    x, dt, B, C = (v.unflatten(1, (-1, q)).movedim(2, 0) for v in (x, dt, B, C))  # (q, b, c, I or N)
    c = x.shape[2]
    decay = torch.exp(dt[..., None] * A)  # (q, b, c, I, N)
    open_ = None
    if sequence_starts is not None:
        goes_on = ~sequence_starts.unflatten(1, (-1, q)).movedim(2, 0)  # (q, b, c)
        decay = decay * goes_on[..., None, None]
        open_ = goes_on.cumprod(0)[..., None, None]  # (q, b, c, 1, 1): no start in this chunk so far
    added = (dt * x)[..., None] * B[..., None, :]  # (q, b, c, I, N)
    inside = torch.cat([h[:, None], h.new_zeros(b, c - 1, inner, N)], dim=1)  # (b, c, I, N)
    states = []
    for t in range(q):
        inside = torch.addcmul(added[t], decay[t], inside)
        states.append(inside)
    y = (torch.stack(states) @ C[..., None])[..., 0]  # (q, b, c, I)
    if c == 1:
        return y[:, :, 0].transpose(0, 1), inside[:, 0]
    reach = torch.exp(dt[:, :, 1:].cumsum(0)[..., None] * A)  # (q, b, c - 1, I, N)
    if open_ is not None:
        reach = reach * open_[:, :, 1:]
    begins = [inside[:, 0]]
    for i in range(1, c):
        begins.append(torch.addcmul(inside[:, i], reach[-1, :, i - 1], begins[-1]))
    h = begins.pop()
    rest = ((reach * torch.stack(begins, dim=1)) @ C[:, :, 1:, :, None])[..., 0]  # (q, b, c - 1, I)
    y = torch.cat([y[:, :, :1], y[:, :, 1:] + rest], dim=2)
    return y.movedim(0, 2).flatten(1, 2), h
