"""The recurrences of ``numpy_ops`` a chunk of tokens at a time: the same results, faster.

Shapes as in ``numpy_ops.mamba2_scan`` and ``numpy_ops.mamba1_scan``; ``chunk`` is the number of tokens of a chunk.
"""

from __future__ import annotations

import numpy as np

from bamba_reference.numpy_ops import Array
from bamba_reference.packing import Bools


def mamba2_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, sequence_starts: Bools, chunk: int
) -> tuple[Array, Array]:
    """Chunk by chunk, by matrix products (Dao and Gu 2024, 2405.21060, section 6 and listing 1).

    Within a chunk token i sees token j <= i through M = exp(a_i - a_j) (C_i . B_j) dt_j, where a is the
    running sum of dt A, and the tokens before the chunk through h, decayed by exp(a_i).
    """
    L, H, _ = x.shape
    heads = H // B.shape[1]
    y = np.empty_like(x)
    for start in range(0, L, chunk):
        now = slice(start, start + chunk)
        X, Bq, Cq = (v[now].transpose(1, 0, 2) for v in (x, B, C))  # (H, q, P), (G, q, N), (G, q, N)
        dtq = dt[now].T  # (H, q)
        # The sum grows to hundreds while the differences that matter are small: float64 keeps their last digits.
        a = np.cumsum(dtq * A[:, None], axis=1, dtype=np.float64)  # (H, q)
        segment = np.cumsum(sequence_starts[now])  # (q,), 0 until a sequence starts within the chunk
        sees = np.tril(segment[:, None] == segment[None, :])  # (q, q)
        # Above the diagonal a_i - a_j > 0 may overflow, and infinity times zero is NaN.
        decay = np.exp(np.minimum(a[:, :, None] - a[:, None, :], 0).astype(x.dtype))  # (H, q, q)
        CB = np.repeat(Cq @ Bq.transpose(0, 2, 1), heads, axis=0)  # (H, q, q)
        M = np.where(sees, decay * CB * dtq[:, None, :], 0)  # (H, q, q)
        reach = np.exp(a.astype(x.dtype)) * (segment == 0)  # (H, q)
        from_before = np.repeat(Cq, heads, axis=0) @ h.transpose(0, 2, 1)  # (H, q, P)
        y[now] = (M @ X + reach[:, :, None] * from_before).transpose(1, 0, 2)
        kept = np.exp((a[:, -1:] - a).astype(x.dtype)) * dtq * (segment == segment[-1])  # (H, q)
        added = (X * kept[:, :, None]).transpose(0, 2, 1) @ np.repeat(Bq, heads, axis=0)
        h = reach[:, -1, None, None] * h + added  # (H, P, N)
    return y, h


def mamba1_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, sequence_starts: Bools, chunk: int
) -> tuple[Array, Array]:
    """All chunks in parallel, token by token within them.

    Each chunk runs from a zero state; then the states at the chunks' beginnings follow from one another, and each
    state, decayed by the sum of dt since the chunk's beginning, is added to the outputs.
    """
    (L, inner), N = x.shape, A.shape[1]
    count = -(-L // chunk)
    missing = count * chunk - L

    def chunks(v: Array) -> Array:
        """(L, …) -> (chunk, count, …), padded at the end with zeros: dt = 0 changes no state."""
        filled = np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)])
        split: Array = filled.reshape(count, chunk, *v.shape[1:])
        return split.swapaxes(0, 1)

    xs, dts, Bs, Cs, starts = (chunks(v) for v in (x, dt, B, C, sequence_starts))
    y = np.empty_like(xs)  # (chunk, count, I)
    inside = np.zeros((count, inner, N), x.dtype)  # (count, I, N)
    for t in range(chunk):
        decay = np.exp(dts[t, :, :, None] * A) * ~starts[t, :, None, None]  # (count, I, N)
        inside = decay * inside + (dts[t] * xs[t])[:, :, None] * Bs[t, :, None, :]
        y[t] = (inside @ Cs[t, :, :, None])[..., 0]  # (count, I)
    # A sequence start within a chunk cuts off the state from before the chunk.
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
