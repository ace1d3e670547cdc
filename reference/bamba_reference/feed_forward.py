"""The feed-forward half of a layer: SwiGLU (Shazeer 2020, 2002.05202) and, in some models, experts beside it.

Of the experts each token uses the ``num_experts_per_tok`` to which the router gives the largest logits, weighted
by the softmax of these logits alone (transformers' ``modeling_granitemoehybrid.py``; Shazeer et al. 2017,
1701.06538, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.mixers.base import Shape, linear_shapes
from bamba_reference.numpy_ops import Array, linear, product, silu, softmax

# Endings of names as in ``mixers.Mixer.wide``.
WIDE = ("moe.router.weight",)


def tensors(config: Config) -> dict[str, Shape]:
    """Name within the layer -> shape, the norm before it included; nothing for a model without."""
    d, width, mlp_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    if width == 0:
        return {}
    shapes: dict[str, Shape] = {"pre_ff_layernorm.weight": (d,)}
    if config.num_local_experts:
        E, inner = config.num_local_experts, config.expert_intermediate_size
        shapes |= {"moe.router.weight": (E, d)}
        shapes |= {"moe.gate_proj.weight": (E, inner, d), "moe.up_proj.weight": (E, inner, d)}
        shapes |= {"moe.down_proj.weight": (E, d, inner)}
    shapes |= linear_shapes("feed_forward.gate_proj", width, d, mlp_bias)
    shapes |= linear_shapes("feed_forward.up_proj", width, d, mlp_bias)
    shapes |= linear_shapes("feed_forward.down_proj", d, width, mlp_bias)
    return shapes


def feed_forward(config: Config, w: Mapping[str, Array], u: Array) -> Array:
    """Of normed hidden states u (L, d): what is added to the stream, (L, d)."""
    y = swiglu(w, u)
    return y + experts(w, u, config.num_experts_per_tok) if config.num_local_experts else y


def swiglu(w: Mapping[str, Array], u: Array) -> Array:
    gate, up = linear(w, "feed_forward.gate_proj", u), linear(w, "feed_forward.up_proj", u)  # (L, ffn)
    return linear(w, "feed_forward.down_proj", silu(gate) * up)


def experts(w: Mapping[str, Array], u: Array, count: int) -> Array:
    """The weighted sum of ``count`` experts for each token of u (L, d)."""
    logits = product(u, w["moe.router.weight"])  # (L, E)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :count]  # (L, count)
    shares = softmax(np.take_along_axis(logits, chosen, axis=-1))  # (L, count)
    y = np.zeros_like(u)
    for e in np.unique(chosen):
        tokens, place = np.nonzero(chosen == e)  # (n,), (n,)
        x = u[tokens]  # (n, d)
        gate, up = product(x, w["moe.gate_proj.weight"][e]), product(x, w["moe.up_proj.weight"][e])
        y[tokens] += shares[tokens, place, None] * product(silu(gate) * up, w["moe.down_proj.weight"][e])
    return y
