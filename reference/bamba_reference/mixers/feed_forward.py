"""Feed-forward blocks: SwiGLU (Shazeer 2020, 2002.05202) and a mixture of SwiGLU experts.

Of the experts each token uses the ``num_experts_per_tok`` to which the router gives the largest logits, weighted
by the softmax of these logits alone (transformers' ``modeling_granitemoehybrid.py``; Shazeer et al. 2017,
1701.06538, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.mixers.base import Memory, Mixer, Sequence, Shape, linear_shapes
from bamba_reference.numpy_ops import Array, linear, product, silu, softmax


def mlp_tensors(config: Config) -> dict[str, Shape]:
    d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    shapes: dict[str, Shape] = dict(linear_shapes("feed_forward.gate_proj", width, d, bias))
    shapes |= linear_shapes("feed_forward.up_proj", width, d, bias)
    shapes |= linear_shapes("feed_forward.down_proj", d, width, bias)
    return shapes


def mlp(
    config: Config, w: Mapping[str, Array], u: Array, before: Memory, sequence: Sequence
) -> tuple[Array, Memory]:
    """down(silu(gate(u)) * up(u)) of u (L, d)."""
    gate, up = linear(w, "feed_forward.gate_proj", u), linear(w, "feed_forward.up_proj", u)  # (L, ffn)
    return linear(w, "feed_forward.down_proj", silu(gate) * up), None


def moe_tensors(config: Config) -> dict[str, Shape]:
    d, E, inner = config.hidden_size, config.num_local_experts, config.expert_intermediate_size
    return {
        "moe.router.weight": (E, d),
        "moe.gate_proj.weight": (E, inner, d),
        "moe.up_proj.weight": (E, inner, d),
        "moe.down_proj.weight": (E, d, inner),
    }


def moe(
    config: Config, w: Mapping[str, Array], u: Array, before: Memory, sequence: Sequence
) -> tuple[Array, Memory]:
    """The weighted sum of the chosen experts for each token of u (L, d)."""
    logits = product(u, w["moe.router.weight"])  # (L, E)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : config.num_experts_per_tok]  # (L, k)
    shares = softmax(np.take_along_axis(logits, chosen, axis=-1))  # (L, k)
    y = np.zeros_like(u)
    for e in np.unique(chosen):
        tokens, place = np.nonzero(chosen == e)  # (n,), (n,)
        x = u[tokens]  # (n, d)
        gate, up = product(x, w["moe.gate_proj.weight"][e]), product(x, w["moe.up_proj.weight"][e])
        y[tokens] += shares[tokens, place, None] * product(silu(gate) * up, w["moe.down_proj.weight"][e])
    return y, None


MLP = Mixer(mlp_tensors, wide=(), mix=mlp)
MOE = Mixer(moe_tensors, wide=("moe.router.weight",), mix=moe)
