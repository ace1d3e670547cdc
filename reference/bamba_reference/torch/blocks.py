"""The blocks of a layer in torch, batched; names, shapes and sources are those of ``model``, with a batch B in front.

A block is a function of the model, the layer's tensors, the normed hidden states u (B, L, d) in the model's dtype,
``BatchTokens`` and the block's state: None in a pass without a state, and for blocks that keep none. It returns what is
added to the residual stream, (B, L, d), in the model's dtype or wider, and updates the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bamba_reference.config import Block, Config
from bamba_reference.tensors import MIXER_NORMS
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.ops import scaled, unit_norm, wide
from bamba_reference.torch.scan import ScanArguments, SelectiveScanArguments
from bamba_reference.torch.state import AttentionState, MambaState, empty_mamba_state


@dataclass(frozen=True)
class Model:
    """A configuration with its weights as tensors by the names in ``tensors``, on one device.

    ``dtype`` is that of the matrices and of the activations; ``stored_dtype`` has each tensor's. ``chunk`` is the
    chunk size of scans; it suits the device and may differ from the checkpoint's, because chunking is exact.
    """

    config: Config
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    chunk: int


@dataclass(frozen=True)
class BatchTokens:
    """A ``packing.Layout`` as the blocks read it: tensors on the model's device."""

    cos: Tensor  # (B or 1, L, rotary_dim / 2), wide
    sin: Tensor
    sequence_starts: Tensor | None  # (B, L)
    real: Tensor | None  # (B, L)
    padding: Tensor | None  # (B,)
    packed: list[tuple[int, int, int]] | None  # (row, start, stop) of each packed sequence

    def first(self, tokens: int) -> BatchTokens:
        """The first ``tokens`` of whole texts, which have neither padding nor packed sequences."""
        assert self.sequence_starts is None and self.real is None and self.packed is None
        return replace(self, cos=self.cos[:, :tokens], sin=self.sin[:, :tokens])


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors by their names within it."""

    model: Model
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.model.weights[self.prefix + name]

    def get(self, name: str) -> Tensor | None:
        return self.model.weights.get(self.prefix + name)

    def matrix(self, name: str) -> tuple[Tensor, Tensor | None, str]:
        """The matrix ``name``, its bias if it has one, and the matrix's full name: the last arguments of ``linear``."""
        return self[f"{name}.weight"], self.get(f"{name}.bias"), f"{self.prefix}{name}.weight"

    def linear(self, name: str, x: Tensor, *, bias: bool = True, multiplier: float = 1.0) -> Tensor:
        """x (…, in) times the matrix ``name`` transposed, plus its bias if it has one, unless ``bias`` is false.

        ``multiplier`` scales the product before the bias is added. Scaling x would change what calibration observes,
        and GGUF has the multiplier in the matrix.
        """
        weight, added, full_name = self.matrix(name)
        added = added if bias else None
        if multiplier == 1 or added is None:
            return scaled(self.model.backend.linear(x, weight, added, full_name), multiplier)
        return self.model.backend.linear(x, weight, None, full_name) * multiplier + added


def mamba2(model: Model, w: LayerWeights, u: Tensor, batch: BatchTokens, state: MambaState | None) -> Tensor:
    config, ops = model.config, model.backend
    H, P, G, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state
    inner = config.mamba_d_inner
    of_z, *of_xBC, of_dt = config.ssm_multipliers
    # (B, L, I + (I + 2GN) + H), in the order z | x, B, C | dt
    zxBCdt = w.linear("mamba.in_proj", u, multiplier=config.ssm_in_multiplier)
    z, xBC, dt = zxBCdt.split([inner, config.mamba_conv_dim, H], dim=-1)
    taps = w["mamba.conv1d.weight"][:, 0]  # (I + 2GN, K), wide
    if any(multiplier != 1 for multiplier in of_xBC):  # fewer numbers than xBC has, and wider
        parts = taps.split([inner, G * N, G * N])
        taps = torch.cat([part * multiplier for part, multiplier in zip(parts, of_xBC, strict=True)])
    if batch.real is not None:
        xBC = xBC * batch.real[..., None]
    before = state or empty_mamba_state(config, "mamba2", len(u), u.dtype, u.device)
    convolved = ops.conv(
        xBC, taps, w.get("mamba.conv1d.bias"), before.tail, batch.sequence_starts
    )  # (B, L, I + 2GN), wide
    x, B, C = convolved.split([inner, G * N, G * N], dim=-1)
    y, h = ops.scan(
        ScanArguments(
            x=x.unflatten(-1, (H, P)),
            dt=scaled(dt, of_dt),
            A_log=w["mamba.A_log"],
            B=B.unflatten(-1, (G, N)),
            C=C.unflatten(-1, (G, N)),
            D=w["mamba.D"],
            dt_bias=w["mamba.dt_bias"],
            dt_limit=config.time_step_limit,
            h=before.h,
            chunk=model.chunk,
            sequence_starts=batch.sequence_starts,
            real=batch.real,
        )
    )  # (B, L, H, P)
    if state is not None:
        state.update(ops, xBC, h)
    y = y.flatten(2)  # (B, L, I)
    if config.mamba_rms_norm:
        y = ops.gated_norm(y, scaled(z, of_z), w["mamba.norm.weight"], G, config.rms_norm_eps)
    else:
        y = ops.swiglu(z.to(y.dtype), y, of_z).to(u.dtype)
    return scaled(w.linear("mamba.out_proj", y), config.ssm_out_multiplier)


def mamba1(model: Model, w: LayerWeights, u: Tensor, batch: BatchTokens, state: MambaState | None) -> Tensor:
    config, ops = model.config, model.backend
    inner, N, R = config.mamba_d_inner, config.mamba_d_state, config.mamba_time_step_rank
    x, z = w.linear("mamba.in_proj", u).split([inner, inner], dim=-1)  # (B, L, I) each
    if batch.real is not None:
        x = x * batch.real[..., None]
    before = state or empty_mamba_state(config, "mamba1", len(u), u.dtype, u.device)
    convolved = ops.conv(
        x, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), before.tail, batch.sequence_starts
    )  # (B, L, I), wide
    dt, B, C = w.linear("mamba.x_proj", convolved.to(u.dtype)).split([R, N, N], dim=-1)
    if config.mixer_rms_eps is not None:
        norms = zip((dt, B, C), map(w.get, MIXER_NORMS), strict=True)
        dt, B, C = (
            unit_norm(v, config.mixer_rms_eps)
            if weight is None
            else ops.rms_norm(v, weight, config.mixer_rms_eps)
            for v, weight in norms
        )
    y, h = ops.selective_scan(
        SelectiveScanArguments(
            x=convolved,
            dt=w.linear("mamba.dt_proj", dt.to(u.dtype), bias=False),  # the scan adds the bias, wide
            A_log=w["mamba.A_log"],
            B=B,
            C=C,
            D=w["mamba.D"],
            z=z,
            dt_bias=w["mamba.dt_proj.bias"],
            h=before.h,
            chunk=model.chunk,
            sequence_starts=batch.sequence_starts,
            real=batch.real,
        )
    )  # (B, L, I)
    if state is not None:
        state.update(ops, x, h)
    return w.linear("mamba.out_proj", y)


def attention(
    model: Model, w: LayerWeights, u: Tensor, batch: BatchTokens, state: AttentionState | None
) -> Tensor:
    config, ops, before = model.config, model.backend, model.config.attention_in_multiplier
    q, k, v = (
        w.linear(f"self_attn.{name}_proj", u, multiplier=before).unflatten(-1, (-1, config.head_dim))
        for name in "qkv"
    )  # (B, L, heads, E), (B, L, kv, E), (B, L, kv, E)
    k = scaled(k, config.key_multiplier)
    if config.rotary_dim:
        q, k = (ops.rotary(x, batch.cos, batch.sin) for x in (q, k))
    if state is not None:
        k, v = state.append(k, v)  # (B, S, kv, E)
    y = ops.attention(q, k, v, config.attention_scale, batch.padding, batch.packed)  # (B, L, heads, E)
    return scaled(w.linear("self_attn.o_proj", y.flatten(2)), config.attention_out_multiplier)


def mlp(model: Model, w: LayerWeights, u: Tensor, batch: BatchTokens, state: None) -> Tensor:
    return scaled(w.linear("feed_forward.down_proj", activated(model, w, u)), model.config.mlp_multipliers[1])


def activated(model: Model, w: LayerWeights, u: Tensor) -> Tensor:
    """The input of the down projection, silu(gate(u)) * up(u) or without a gate relu(up(u))²: (B, L, ffn)."""
    ops, multiplier = model.backend, model.config.mlp_multipliers[0]
    gate, up = "feed_forward.gate_proj", "feed_forward.up_proj"
    if not model.config.has_gate:
        return ops.relu2(w.linear(up, u))
    if ops.gate_up is None:
        return ops.swiglu(w.linear(gate, u), w.linear(up, u), multiplier)
    return ops.gate_up(u, w.matrix(gate), w.matrix(up), multiplier)


def moe(model: Model, w: LayerWeights, u: Tensor, batch: BatchTokens, state: None) -> Tensor:
    """The weighted sum of each token's experts, wide.

    The router's product is wide too: a logit rounded to bfloat16 chooses other experts.
    """
    config, ops, x = model.config, model.backend, u.flatten(0, -2)  # (T, d)
    chosen, weights = routed(config, w, w.linear("moe.router", x.to(wide(x.dtype))))  # (T, k), (T, k)
    if config.moe_latent_size:
        x = w.linear("moe.latent_down", x)  # (T, R)
    stacks = (w.get(f"moe.{name}_proj.weight") for name in ("gate", "up", "down"))
    experts = ops.experts or partial(each_expert, ops, prefix=f"{w.prefix}moe.")
    y = experts(x, chosen, weights, *stacks)  # (T, d or R), wide
    if config.moe_latent_size:
        y = w.linear("moe.latent_up", y.to(x.dtype))
    return y.view(*u.shape[:-1], -1)


def routed(config: Config, w: LayerWeights, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``routing.routed``: experts and weights, (T, k) each, of the router's logits (T, E)."""
    k = config.num_experts_per_tok
    if config.expert_scores == "softmax":
        largest, chosen = logits.topk(k, dim=-1)
        if config.norm_topk_prob:
            return chosen, largest.softmax(dim=-1)
        return chosen, logits.softmax(dim=-1).gather(-1, chosen)
    scores = logits.sigmoid()
    ranks = scores + w["moe.router.correction"]
    if config.expert_groups > 1:
        groups = ranks.unflatten(-1, (config.expert_groups, -1))  # (T, G, E/G)
        used = groups.topk(2, dim=-1).values.sum(-1).topk(config.used_expert_groups, dim=-1).indices
        unused = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, used, False)  # (T, G)
        ranks = groups.masked_fill(unused[..., None], -torch.inf).flatten(-2)
    chosen = ranks.topk(k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * config.expert_weights_scale


def each_expert(
    ops: Backend,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    prefix: str = "",
) -> Tensor:
    """``Backend.experts`` expert by expert, where each product is seen, by the other operations of ``ops``.

    ``linear`` receives the matrix of expert e under the stacked tensor's name and ``[e]``.
    """
    y = torch.zeros_like(x, dtype=weights.dtype)
    for e in chosen.unique().tolist():
        token, rank = (chosen == e).nonzero(as_tuple=True)  # (n,), (n,)

        def linear(name: str, stack: Tensor, x: Tensor, e: int = e) -> Tensor:
            return ops.linear(x, stack[e], None, f"{prefix}{name}_proj.weight[{e}]")

        some = x[token]  # (n, d)
        hidden = linear("up", up, some)
        hidden = ops.relu2(hidden) if gate is None else ops.swiglu(linear("gate", gate, some), hidden)
        out = linear("down", down, hidden)
        y.index_add_(0, token, out.to(y.dtype) * weights[token, rank, None])
    return y


BLOCKS: dict[Block, Callable[[Model, LayerWeights, Tensor, BatchTokens, Any], Tensor]] = {
    "mamba2": mamba2,
    "mamba1": mamba1,
    "attention": attention,
    "mlp": mlp,
    "moe": moe,
}
