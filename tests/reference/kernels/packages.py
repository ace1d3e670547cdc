"""The functions of mamba_ssm and causal_conv1d that the backend calls, written in torch from their documentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x (B, D, L) and initial_states (B, D, K-1) with contiguous channels, weight (D, K)."""
    (B, D, L), K = x.shape, weight.shape[1]
    assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == D % 8 == 0 and weight.is_contiguous()
    before = x.new_zeros(B, D, K - 1) if initial_states is None else initial_states
    assert initial_states is None or initial_states.stride(1) == 1
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and initial_states is None)
    padded, total = torch.cat([before, x], dim=2), torch.zeros_like(x)
    for back in range(K):
        term = weight[:, K - 1 - back, None] * padded[:, :, K - 1 - back : K - 1 - back + L]
        if seq_idx is not None:
            term = term * (F.pad(seq_idx, (back, 0), value=-1)[:, :L] == seq_idx)[:, None]
        total = total + term
    total = total if bias is None else total + bias[:, None]
    return F.silu(total) if activation == "silu" else total


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """u, delta and z (B, I, L), B and C (B, N, L), A (I, N) below 0."""
    assert delta_softplus and return_last_state and all(v.stride(-1) == 1 for v in (u, delta, B, C, z))
    assert {v.dtype for v in (u, delta, B, C, z)} == {u.dtype} and A.dtype == torch.float32
    h, steps = u.new_zeros(*u.shape[:2], A.shape[1]), F.softplus(delta + delta_bias[:, None])
    ys = []
    for t in range(u.shape[2]):
        h = torch.exp(steps[:, :, t, None] * A) * h + (steps * u)[:, :, t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, dim=2) * F.silu(z), h


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """state (B, I, N), which is updated; x, dt and z (B, I), B and C (B, N)."""
    assert dt_softplus
    step = F.softplus(dt + dt_bias)[..., None]
    state.copy_(torch.exp(step * A) * state + step * x[..., None] * B[:, None])
    return ((state * C[:, None]).sum(-1) + D * x) * F.silu(z)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, P), dt (B, L, H), A (H,) below 0, B and C (B, L, G, N), initial_states (B, H, P, N).

    A sequence's first token sees no state; the one before the row's first token belongs to ``seq_idx`` 0.
    """
    assert dt_softplus and return_final_states and chunk_size > 0
    assert seq_idx is None or seq_idx.dtype == torch.int32
    steps = F.softplus(dt + dt_bias).clamp(*dt_limit)
    each = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(each, dim=2), C.repeat_interleave(each, dim=2)
    h, ys, before = initial_states, [], torch.zeros_like(seq_idx[:, 0]) if seq_idx is not None else None
    for t in range(x.shape[1]):
        if seq_idx is not None:
            h = h * (seq_idx[:, t] == before)[:, None, None, None]
            before = seq_idx[:, t]
        kept = torch.exp(steps[:, t] * A)[..., None, None]
        h = kept * h + (steps[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1), h


def rmsnorm_fn(
    x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    gated = x if norm_before_gate else x * F.silu(z)
    groups = gated.unflatten(-1, (-1, group_size))
    y = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    return y * F.silu(z) if norm_before_gate else y
