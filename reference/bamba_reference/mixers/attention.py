"""Causal attention with grouped queries (Ainslie et al. 2023, 2305.13245), rotary where the model rotates.

Rotary embedding: Su et al. 2021 (2104.09864). Shapes: heads of size E, ``heads`` for queries and ``kv`` for keys
and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.mixers.base import Memory, Mixer, Sequence, Shape, linear_shapes
from bamba_reference.numpy_ops import Array, linear, softmax
from bamba_reference.packing import Ints


def tensors(config: Config) -> dict[str, Shape]:
    d, bias = config.hidden_size, config.attention_bias
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = dict(linear_shapes("self_attn.q_proj", queries, d, bias))
    shapes |= linear_shapes("self_attn.k_proj", keys, d, bias)
    shapes |= linear_shapes("self_attn.v_proj", keys, d, bias)
    shapes |= linear_shapes("self_attn.o_proj", d, queries, bias)
    return shapes


def mix(
    config: Config, w: Mapping[str, Array], u: Array, before: Memory, sequence: Sequence
) -> tuple[Array, Memory]:
    """On u (L, d); leaves the keys and values (S, kv, E) of all tokens up to the last."""
    L, heads, kv, E = len(u), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = linear(w, "self_attn.q_proj", u).reshape(L, heads, E)
    k = linear(w, "self_attn.k_proj", u).reshape(L, kv, E)
    v = linear(w, "self_attn.v_proj", u).reshape(L, kv, E)
    q, k = rotary(q, sequence.positions, config), rotary(k, sequence.positions, config)
    if before is not None:
        k, v = np.concatenate([before[0], k]), np.concatenate([before[1], v])  # (S, kv, E)
    S = len(k)
    keys, values = (np.repeat(t, heads // kv, axis=1) for t in (k, v))  # (S, heads, E)
    scores = q.transpose(1, 0, 2) @ keys.transpose(1, 2, 0)  # (heads, L, S)
    scores = scores * u.dtype.type(config.attention_scale)
    segment = np.zeros(L, int) if sequence.fresh is None else np.cumsum(sequence.fresh)
    segment = np.concatenate([np.zeros(S - L, int), segment])  # (S,)
    sees = np.tril(segment[S - L :, None] == segment[None, :], S - L)  # (L, S)
    p = softmax(np.where(sees, scores, -np.inf))  # (heads, L, S)
    y = (p @ values.transpose(1, 0, 2)).transpose(1, 0, 2)  # (L, heads, E)
    return linear(w, "self_attn.o_proj", y.reshape(L, heads * E)), (k, v)


def rotary_angles(config: Config, positions: Ints) -> Array:
    """(…, rotary_dim / 2) angles in float64: in float32 they would be off by 3e-5 at position 1,000."""
    r = config.rotary_dim
    return positions[..., None] * config.rope_theta ** (-np.arange(0, r, 2, dtype=np.float64) / r)


def rotary(x: Array, positions: Ints, config: Config) -> Array:
    """Rotate pairs (i, i + r/2) of each head's first r = rotary_dim elements, pass the rest: x (L, n, E)."""
    half = config.rotary_dim // 2
    angle = rotary_angles(config, positions)[:, None, :]  # (L, 1, r/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


ATTENTION = Mixer(tensors, wide=(), mix=mix)
