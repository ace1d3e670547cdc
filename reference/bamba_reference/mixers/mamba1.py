"""Mamba's selective scan (Gu and Dao 2023, "Mamba", arXiv 2312.00752, algorithm 2 and section 3.3): the definition.

Every channel has a state and a step of its own, so there are no heads; B, C and dt are products of what leaves
the convolution. FalconMamba normalizes the three without weights. Shapes: I channels, state size N, dt from R
elements.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bamba_reference.config import Config
from bamba_reference.mixers.base import Memory, Mixer, Sequence, Shape, linear_shapes
from bamba_reference.numpy_ops import Array, causal_conv, linear, product, rms_norm, silu, softplus
from bamba_reference.packing import Bools


def tensors(config: Config) -> dict[str, Shape]:
    inner, N, R = config.mamba_d_inner, config.mamba_d_state, config.mamba_time_step_rank
    d, bias = config.hidden_size, config.mamba_proj_bias
    shapes: dict[str, Shape] = dict(linear_shapes("mamba.in_proj", config.mamba_in_proj_dim, d, bias))
    shapes |= {"mamba.conv1d.weight": (inner, 1, config.mamba_d_conv)}
    shapes |= {"mamba.conv1d.bias": (inner,)} if config.mamba_conv_bias else {}
    shapes |= linear_shapes("mamba.x_proj", R + 2 * N, inner, bias=False)
    shapes |= linear_shapes("mamba.dt_proj", inner, R, bias=True)
    shapes |= {"mamba.A_log": (inner, N), "mamba.D": (inner,)}
    shapes |= linear_shapes("mamba.out_proj", d, inner, bias)
    return shapes


def mix(
    config: Config, w: Mapping[str, Array], u: Array, before: Memory, sequence: Sequence
) -> tuple[Array, Memory]:
    """On u (L, d); leaves the last inputs of the convolution (K-1, I) and the state h (I, N)."""
    L, K, inner, fresh = len(u), config.mamba_d_conv, config.mamba_d_inner, sequence.fresh
    N, R = config.mamba_d_state, config.mamba_time_step_rank
    x, z = np.split(linear(w, "mamba.in_proj", u), [inner], axis=-1)  # (L, I) each
    if before is None:
        before = np.zeros((K - 1, inner), u.dtype), np.zeros((inner, N), u.dtype)
    tail, h = before
    joined = np.concatenate([tail, x])  # (K-1+L, I)
    x = silu(causal_conv(joined, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), fresh))
    dt, B, C = np.split(linear(w, "mamba.x_proj", x), [R, R + N], axis=-1)  # (L, R), (L, N), (L, N)
    if config.mixer_rms_eps is not None:
        dt, B, C = (rms_norm(v, None, config.mixer_rms_eps) for v in (dt, B, C))
    dt = softplus(product(dt, w["mamba.dt_proj.weight"]) + w["mamba.dt_proj.bias"])  # (L, I)
    A = -np.exp(w["mamba.A_log"])  # (I, N)
    starts = np.zeros(L, bool) if fresh is None else fresh
    if sequence.scan == "sequential":
        y, h = sequential_scan(x, dt, A, B, C, h, starts)
    else:
        y, h = chunked_scan(x, dt, A, B, C, h, starts, sequence.chunk)
    y = (y + w["mamba.D"] * x) * silu(z)  # (L, I)
    return linear(w, "mamba.out_proj", y), (joined[L:], h)


def sequential_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, fresh: Bools
) -> tuple[Array, Array]:
    """h = exp(dt A) h + dt x (outer) B, y = h C, token by token.

    x and dt (L, I), A (I, N), B and C (L, N), h (I, N), fresh (L,) -> y (L, I), h.
    """
    y = np.empty_like(x)
    for t in range(len(x)):
        decay = np.exp(dt[t, :, None] * A) * (not fresh[t])  # (I, N)
        h = decay * h + (dt[t] * x[t])[:, None] * B[t]  # (I, N)
        y[t] = h @ C[t]  # (I,)
    return y, h


def chunked_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, fresh: Bools, chunk: int
) -> tuple[Array, Array]:
    """The same recurrence, all chunks of tokens side by side; shapes as in ``sequential_scan``.

    Each chunk runs from an empty state, then the states at the chunks' borders follow from one another, and
    what a chunk began with, decayed by the sum of its dt so far, is added to its outputs.
    """
    (L, inner), N = x.shape, A.shape[1]
    count = -(-L // chunk)
    missing = count * chunk - L

    def chunks(v: Array) -> Array:
        """(L, …) -> (chunk, count, …), what is missing at the end filled with zeros: dt = 0 changes no state."""
        filled = np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)])
        split: Array = filled.reshape(count, chunk, *v.shape[1:])
        return split.swapaxes(0, 1)

    xs, dts, Bs, Cs, starts = (chunks(v) for v in (x, dt, B, C, fresh))
    y = np.empty_like(xs)  # (chunk, count, I)
    inside = np.zeros((count, inner, N), x.dtype)  # (count, I, N)
    for t in range(chunk):
        decay = np.exp(dts[t, :, :, None] * A) * ~starts[t, :, None, None]  # (count, I, N)
        inside = decay * inside + (dts[t] * xs[t])[:, :, None] * Bs[t, :, None, :]
        y[t] = (inside @ Cs[t, :, :, None])[..., 0]  # (count, I)
    # A start within a chunk cuts off what the chunk began with.
    open_ = np.logical_and.accumulate(~starts, axis=0)  # (chunk, count)
    passed = np.cumsum(dts, axis=0, dtype=np.float64).astype(x.dtype)  # (chunk, count, I)
    begins = np.empty((count, inner, N), x.dtype)
    for c in range(count):
        begins[c] = h
        h = np.exp(passed[-1, c, :, None] * A) * open_[-1, c] * h + inside[c]  # (I, N)
    for t in range(chunk):
        reach = np.exp(passed[t, :, :, None] * A) * open_[t, :, None, None]  # (count, I, N)
        y[t] += ((reach * begins) @ Cs[t, :, :, None])[..., 0]
    return y.swapaxes(0, 1).reshape(-1, inner)[:L], h


# dt's bias is added, and the convolution computed, in float32.
MAMBA1 = Mixer(
    tensors,
    wide=("conv1d.weight", "conv1d.bias", "dt_proj.bias", "mamba.A_log", "mamba.D"),
    mix=mix,
)
