"""The recurrences of Mamba-2 and Mamba in plain torch: any device, any float dtype, differentiable.

Every backend takes the same arguments, ``ScanArguments`` and ``SelectiveScanArguments``. B rows of L tokens; H heads of
size P in G groups (Mamba-2) or I channels (Mamba); state size N. "Wide" is float32, or float64 for a float64 model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Elements that are computed at once of the (chunks, H, q, q) matrix of ``scan`` and of the (tokens, I, N) decays of
# ``selective_scan``: 2 MB stay in the cache of a CPU's core; a GPU is faster the fewer steps there are.
_CPU_ELEMENTS = 1 << 19
_GPU_MATRIX_ELEMENTS, _GPU_STATE_ELEMENTS = 1 << 27, 1 << 26


class ScanArguments(NamedTuple):
    """The arguments of Mamba-2's recurrence."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H), before bias, softplus and limits
    A_log: Tensor  # (H,), A = -exp(A_log)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor  # (H,)
    dt_bias: Tensor  # (H,)
    dt_limit: tuple[float, float]  # bounds of dt after softplus
    h: Tensor  # (B, H, P, N), wide: the state before the first token
    chunk: (
        int  # tokens of a chunk, for backends that do not choose their own; it changes rounding errors only
    )
    sequence_starts: Tensor | None  # (B, L), true for tokens that begin a packed sequence
    real: Tensor | None  # (B, L), false at padding, which leaves the state as it is


class SelectiveScanArguments(NamedTuple):
    """The arguments of Mamba's recurrence; those without a comment are as in ``ScanArguments``."""

    x: Tensor  # (B, L, I)
    dt: Tensor  # (B, L, I), before bias and softplus
    A_log: Tensor  # (I, N)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor  # (I,)
    z: Tensor  # (B, L, I), the gate
    dt_bias: Tensor  # (I,)
    h: Tensor  # (B, I, N), wide
    chunk: int
    sequence_starts: Tensor | None
    real: Tensor | None


def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence in chunks (Dao and Gu 2024, 2405.21060, section 6).

    Returns y (B, L, H, P) = h C + D x, wide, and h after the last token.
    """
    x, dt, A_log, B, C, D, dt_bias, dt_limit, h, chunk, sequence_starts, real = arguments
    dtype = h.dtype
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype)).clamp(*dt_limit)  # (B, L, H)
    if real is not None:
        dt = dt * real[..., None]
    dtA = dt * -torch.exp(A_log.to(dtype))  # (B, L, H)
    outputs = []
    elements = _CPU_ELEMENTS if x.device.type == "cpu" else _GPU_MATRIX_ELEMENTS
    for start, stop, q in _runs(x.shape[1], chunk, most=elements // (x.shape[0] * x.shape[2] * chunk**2)):
        now = slice(start, stop)
        starts = None if sequence_starts is None else sequence_starts[:, now]
        y, h = _mamba2_chunks(
            x[:, now], dt[:, now], dtA[:, now], B[:, now], C[:, now], D.to(dtype), h, q, starts
        )
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), h


def _mamba2_chunks(
    x: Tensor,
    dt: Tensor,
    dtA: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    h: Tensor,
    q: int,
    sequence_starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``scan`` over c whole chunks of q tokens, for dt and dtA (b, c * q, H) already discretized."""
    b, _, H, P = x.shape
    G, N = B.shape[2:]
    x, B, C = x.unflatten(1, (-1, q)), B.unflatten(1, (-1, q)), C.unflatten(1, (-1, q))  # (b, c, q, H, P), …
    c = x.shape[1]
    dt = dt.unflatten(1, (c, q)).transpose(2, 3)  # (b, c, H, q)
    # The sum grows to hundreds while the differences that matter are small: float64 keeps their last digits.
    a = dtA.unflatten(1, (c, q)).transpose(2, 3).double().cumsum(-1)  # (b, c, H, q)
    # Above the diagonal minus infinity, so that exp gives zero; a falls, so below it exp cannot overflow.
    mask = torch.full((q, q), -torch.inf, dtype=x.dtype, device=x.device).triu(1)  # (q, q)
    # (b, c, H, q): of h into token i, of token j into h
    reach, keep = a.to(x.dtype).exp(), (a[..., -1:] - a).to(x.dtype).exp() * dt
    if sequence_starts is not None:
        segment = sequence_starts.unflatten(1, (c, q)).cumsum(-1)[:, :, None]  # (b, c, 1, q)
        apart = segment[..., :, None] != segment[..., None, :]  # (b, c, 1, q, q)
        mask = mask.expand_as(apart).masked_fill(apart, -torch.inf)
        reach = reach * (segment == 0)
        keep = keep * (segment == segment[..., -1:])
    CB = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (b, c, G, q, q), once a group, not once a head
    difference = (a[..., :, None] - a[..., None, :]).to(x.dtype)  # (b, c, H, q, q)
    M = (difference + mask).exp() * dt[..., None, :]  # (b, c, H, q, q)
    M = (M.unflatten(2, (G, -1)) * CB[:, :, :, None]).flatten(2, 3)  # (b, c, H, q, q)
    M.diagonal(dim1=-2, dim2=-1).add_(D[:, None])  # y = … + D x
    y = (M @ x.transpose(2, 3)).transpose(2, 3)  # (b, c, q, H, P)
    xs = (x * keep.transpose(2, 3)[..., None]).view(b, c, q, G, H // G * P)  # (b, c, q, G, HP/G)
    decay = reach[..., -1]  # (b, c, H)
    out = []
    # unbind: each slice's gradient alone would be as large as the whole.
    for yi, Bi, Ci, xi, reached, kept in zip(
        *(t.unbind(1) for t in (y, B, C, xs, reach, decay)), strict=True
    ):
        from_h = Ci.transpose(1, 2) @ h.view(b, G, -1, N).transpose(2, 3)  # (b, G, q, HP/G)
        from_h = from_h.transpose(1, 2).reshape(b, q, H, P)
        out.append(torch.addcmul(yi, from_h, reached.transpose(1, 2)[..., None]))  # (b, q, H, P)
        added = xi.permute(0, 2, 3, 1) @ Bi.transpose(1, 2)  # (b, G, HP/G, N)
        h = torch.addcmul(added.view(b, H, P, N), h, kept[..., None, None])  # (b, H, P, N)
    return out[0] if c == 1 else torch.cat(out, dim=1), h


def selective_scan(arguments: SelectiveScanArguments) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence (Gu and Dao 2023, 2312.00752): h = exp(dt A) h + dt x ⊗ B, y = (h C + D x) silu(z).

    Returns y (B, L, I) in z's dtype and h after the last token. The tokens of a chunk are computed one after the
    other, as many chunks in parallel as fit.
    """
    x, dt, A_log, B, C, D, z, dt_bias, h, chunk, sequence_starts, real = arguments
    dtype = h.dtype
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))  # (B, L, I)
    if real is not None:
        dt = dt * real[..., None]
    A = -torch.exp(A_log.to(dtype))  # (I, N)
    most = (_CPU_ELEMENTS if x.device.type == "cpu" else _GPU_STATE_ELEMENTS) // (h.numel() * chunk)
    outputs = []
    for start, stop, q in _runs(x.shape[1], chunk, most):
        now = slice(start, stop)
        starts = None if sequence_starts is None else sequence_starts[:, now]
        y, h = _mamba1_chunks(x[:, now], dt[:, now], A, B[:, now], C[:, now], h, q, starts)
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return (torch.addcmul(y, x, D.to(dtype)) * F.silu(z.to(dtype))).to(z.dtype), h


def _mamba1_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, q: int, sequence_starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h C and the last h over c whole chunks of q tokens; the first chunk starts from h and the others from zeros.

    Then the states at the chunks' beginnings follow from one another and are added, decayed, to the outputs.
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


def _runs(length: int, chunk: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunk size): runs of at most ``most`` whole chunks, then the remaining tokens as a short chunk."""
    whole = length // chunk * chunk
    for start in range(0, whole, max(1, most) * chunk):
        yield start, min(whole, start + max(1, most) * chunk), chunk
    if whole < length:
        yield whole, length, length - whole
