"""Mamba-2's state-space layer (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060): the definition.

The recurrence is the paper's equation 2, the chunked form its section 6 and listing 1. Shapes: heads H of size P,
state size N, G groups sharing B and C, I = H * P.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.mixers.base import Memory, Mixer, Sequence, Shape, linear_shapes
from bamba_reference.numpy_ops import Array, causal_conv, linear, rms_norm, silu, softplus
from bamba_reference.packing import Bools


def tensors(config: Config) -> dict[str, Shape]:
    H, inner, conv = config.mamba_n_heads, config.mamba_d_inner, config.mamba_conv_dim
    d, bias = config.hidden_size, config.mamba_proj_bias
    shapes: dict[str, Shape] = dict(linear_shapes("mamba.in_proj", config.mamba_in_proj_dim, d, bias))
    shapes |= {"mamba.conv1d.weight": (conv, 1, config.mamba_d_conv)}
    shapes |= {"mamba.conv1d.bias": (conv,)} if config.mamba_conv_bias else {}
    shapes |= {"mamba.dt_bias": (H,), "mamba.A_log": (H,), "mamba.D": (H,), "mamba.norm.weight": (inner,)}
    shapes |= linear_shapes("mamba.out_proj", d, inner, bias)
    return shapes


def mix(
    config: Config, w: Mapping[str, Array], u: Array, before: Memory, sequence: Sequence
) -> tuple[Array, Memory]:
    """On u (L, d); leaves the last inputs of the convolution (K-1, I+2GN) and the state h (H, P, N)."""
    L, K = len(u), config.mamba_d_conv
    H, P, G, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state
    inner, fresh = config.mamba_d_inner, sequence.fresh
    zxBCdt = linear(w, "mamba.in_proj", u)  # (L, I + (I + 2GN) + H), in the order z | x, B, C | dt
    z, xBC, dt = np.split(zxBCdt, [inner, inner + config.mamba_conv_dim], axis=-1)
    if before is None:
        before = np.zeros((K - 1, xBC.shape[1]), u.dtype), np.zeros((H, P, N), u.dtype)
    tail, h = before
    joined = np.concatenate([tail, xBC])  # (K-1+L, I+2GN)
    xBC = silu(causal_conv(joined, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), fresh))
    x, B, C = np.split(xBC, [inner, inner + G * N], axis=-1)
    x = x.reshape(L, H, P)
    B, C = B.reshape(L, G, N), C.reshape(L, G, N)  # head h reads group h // (H / G)
    dt = np.clip(softplus(dt + w["mamba.dt_bias"]), *map(u.dtype.type, config.time_step_limit))  # (L, H)
    A = -np.exp(w["mamba.A_log"])  # (H,)
    starts = np.zeros(L, bool) if fresh is None else fresh
    if sequence.scan == "sequential":
        y, h = sequential_scan(x, dt, A, B, C, h, starts)
    else:
        y, h = chunked_scan(x, dt, A, B, C, h, starts, sequence.chunk)
    y = y + w["mamba.D"][:, None] * x  # (L, H, P)
    # The gate comes before the norm, and each group of heads is normalized alone (norm_before_gate = False).
    gated = (y.reshape(L, inner) * silu(z)).reshape(L, G, inner // G)
    y = rms_norm(gated, w["mamba.norm.weight"].reshape(G, inner // G), config.rms_norm_eps)
    return linear(w, "mamba.out_proj", y.reshape(L, inner)), (joined[L:], h)


def sequential_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, fresh: Bools
) -> tuple[Array, Array]:
    """h = exp(dt A) h + dt x (outer) B, y = h C, token by token.

    x (L, H, P), dt (L, H), A (H,), B and C (L, G, N), h (H, P, N), fresh (L,) -> y (L, H, P), h.
    """
    L, H, _ = x.shape
    B, C = (np.repeat(v, H // v.shape[1], axis=1) for v in (B, C))  # (L, H, N)
    y = np.empty_like(x)
    for t in range(L):
        decay = np.exp(dt[t] * A) * (not fresh[t])  # (H,)
        dBx = (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]  # (H, P, N)
        h = decay[:, None, None] * h + dBx  # (H, P, N)
        y[t] = (h @ C[t, :, :, None])[..., 0]  # (H, P)
    return y, h


def chunked_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, fresh: Bools, chunk: int
) -> tuple[Array, Array]:
    """The same recurrence, a chunk of tokens at a time by matrix products; shapes as in ``sequential_scan``.

    Within a chunk token i sees token j <= i through M = exp(a_i - a_j) (C_i . B_j) dt_j, where a is the
    running sum of dt A, and what came before the chunk through h, decayed by exp(a_i).
    """
    L, H, _ = x.shape
    heads = H // B.shape[1]
    y = np.empty_like(x)
    for start in range(0, L, chunk):
        piece = slice(start, start + chunk)
        X, Bq, Cq = (v[piece].transpose(1, 0, 2) for v in (x, B, C))  # (H, q, P), (G, q, N), (G, q, N)
        dtq = dt[piece].T  # (H, q)
        # The sum grows to hundreds while the differences that matter are small: float64 keeps their last digits.
        a = np.cumsum(dtq * A[:, None], axis=1, dtype=np.float64)  # (H, q)
        segment = np.cumsum(fresh[piece])  # (q,), 0 while the sequence before the chunk goes on
        sees = np.tril(segment[:, None] == segment[None, :])  # (q, q)
        # Above the diagonal a_i - a_j > 0 may overflow, and infinity times zero is no number.
        decay = np.exp(np.minimum(a[:, :, None] - a[:, None, :], 0).astype(x.dtype))  # (H, q, q)
        CB = np.repeat(Cq @ Bq.transpose(0, 2, 1), heads, axis=0)  # (H, q, q)
        M = np.where(sees, decay * CB * dtq[:, None, :], 0)  # (H, q, q)
        reach = np.exp(a.astype(x.dtype)) * (segment == 0)  # (H, q)
        from_before = np.repeat(Cq, heads, axis=0) @ h.transpose(0, 2, 1)  # (H, q, P)
        y[piece] = (M @ X + reach[:, :, None] * from_before).transpose(1, 0, 2)
        kept = np.exp((a[:, -1:] - a).astype(x.dtype)) * dtq * (segment == segment[-1])  # (H, q)
        added = (X * kept[:, :, None]).transpose(0, 2, 1) @ np.repeat(Bq, heads, axis=0)
        h = reach[:, -1, None, None] * h + added  # (H, P, N)
    return y, h


MAMBA2 = Mixer(
    tensors,
    wide=("conv1d.weight", "conv1d.bias", "dt_bias", "mamba.A_log", "mamba.D", "mamba.norm.weight"),
    mix=mix,
)
