"""Mamba's layer in torch; names, shapes and sources are those of ``mixers.mamba1``, with a batch B in front."""

from __future__ import annotations

import torch
from torch import Tensor

from bamba_reference.config import Config
from bamba_reference.torch.mixers.base import BatchTokens, LayerWeights, MambaState, Model, TorchMixer
from bamba_reference.torch.ops import unit_norm, wide
from bamba_reference.torch.scan import SelectiveScanArguments


def mix(model: Model, w: LayerWeights, u: Tensor, sequences: BatchTokens, state: MambaState | None) -> Tensor:
    config, ops = model.config, model.backend
    inner, N, R = config.mamba_d_inner, config.mamba_d_state, config.mamba_time_step_rank
    x, z = w.linear("mamba.in_proj", u).split([inner, inner], dim=-1)  # (B, L, I) each
    if sequences.real is not None:
        x = x * sequences.real[..., None]
    now = state or empty(config, len(u), u.dtype, u.device)
    convolved = ops.conv(
        x, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), now.tail, sequences.sequence_starts
    )  # (B, L, I), wide
    dt, B, C = w.linear("mamba.x_proj", convolved.to(u.dtype)).split([R, N, N], dim=-1)
    if config.mixer_rms_eps is not None:
        dt, B, C = (unit_norm(v, config.mixer_rms_eps) for v in (dt, B, C))
    dt = w.linear("mamba.dt_proj", dt.to(u.dtype), bias=False)  # (B, L, I); the scan adds the bias, wide
    y, h = ops.selective_scan(
        SelectiveScanArguments(
            convolved,
            dt,
            w["mamba.A_log"],
            B,
            C,
            w["mamba.D"],
            z,
            w["mamba.dt_proj.bias"],
            now.h,
            model.chunk,
            sequences.sequence_starts,
            sequences.real,
        )
    )  # (B, L, I)
    if state is not None:
        state.advance(ops, x, h)
    return w.linear("mamba.out_proj", y)


def empty(config: Config, batch: int, dtype: torch.dtype, device: torch.device) -> MambaState:
    """The state before the first token: nothing convolved, nothing remembered."""
    inner = config.mamba_d_inner
    return MambaState(
        tail=torch.zeros(batch, config.mamba_d_conv - 1, inner, dtype=dtype, device=device),
        h=torch.zeros(batch, inner, config.mamba_d_state, dtype=wide(dtype), device=device),
    )


MAMBA1 = TorchMixer(mix, empty)
