"""Mamba-2's layer in torch; names, shapes and sources are those of ``mixers.mamba2``, with a batch B in front."""

from __future__ import annotations

import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.torch.mixers.base import BatchTokens, LayerWeights, MambaState, Model, TorchMixer
from bamba_reference.torch.ops import wide
from bamba_reference.torch.scan import ScanArguments


def mix(model: Model, w: LayerWeights, u: Tensor, sequences: BatchTokens, state: MambaState | None) -> Tensor:
    config, ops = model.config, model.backend
    H, P, G, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state
    inner = config.mamba_d_inner
    zxBCdt = w.linear("mamba.in_proj", u)  # (B, L, I + (I + 2GN) + H), in the order z | x, B, C | dt
    z, xBC, dt = zxBCdt.split([inner, config.mamba_conv_dim, H], dim=-1)
    if sequences.real is not None:
        xBC = xBC * sequences.real[..., None]
    now = state or empty(config, len(u), u.dtype, u.device)
    convolved = ops.conv(
        xBC, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), now.tail, sequences.sequence_starts
    )
    x, B, C = convolved.split([inner, G * N, G * N], dim=-1)
    y, h = ops.scan(
        ScanArguments(
            x.unflatten(-1, (H, P)),  # (B, L, H, P)
            dt,
            w["mamba.A_log"],
            B.unflatten(-1, (G, N)),  # (B, L, G, N)
            C.unflatten(-1, (G, N)),
            w["mamba.D"],
            w["mamba.dt_bias"],
            config.time_step_limit,
            now.h,
            model.chunk,
            sequences.sequence_starts,
            sequences.real,
        )
    )
    if state is not None:
        state.advance(ops, xBC, h)
    y = ops.gated_norm(y.flatten(2), z, w["mamba.norm.weight"], G, config.rms_norm_eps)  # (B, L, I)
    return w.linear("mamba.out_proj", y)


def empty(config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> MambaState:
    """The state before the first token: nothing convolved, nothing remembered."""
    H, P, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state
    return MambaState(
        tail=torch.zeros(batch, config.mamba_d_conv - 1, config.mamba_conv_dim, dtype=dtype, device=device),
        h=torch.zeros(batch, H, P, N, dtype=wide(dtype), device=device),
    )


MAMBA2 = TorchMixer(mix, empty)
