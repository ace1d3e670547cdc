"""The elementary operations and the recurrences of ``model`` in numpy; arrays keep their float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bamba_reference.packing import Bools

Array = npt.NDArray[Any]


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, 1910.07467); no weight means ones."""
    rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))  # (…, 1)
    normed: Array = x / rms
    return normed if weight is None else normed * weight


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite; the quotient is then rightly zero
        y: Array = x / (1 + np.exp(-x))
    return y


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite; the quotient is then rightly zero
        y: Array = 1 / (1 + np.exp(-x))
    return y


def activated(gate: Array | None, up: Array) -> Array:
    """SwiGLU, silu(gate) * up (Shazeer 2020, 2002.05202); without a gate ReLU² (So et al. 2021, 2109.08668)."""
    return np.square(np.maximum(up, 0)) if gate is None else silu(gate) * up


def softplus(x: Array) -> Array:
    y: Array = np.logaddexp(x, x.dtype.type(0))
    return y


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    p: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p


def matmul(x: Array, weight: Array, terms: int = 64) -> Array:
    """x (L, in) times weight (out, in) transposed, summed in parts of ``terms``.

    In float32 a BLAS that sums 512 terms in one go has an error of 2.9e-7, enough to put the logits of a trained
    model further from the truth than transformers'; parts of 64 halve the error.
    """
    y: Array = np.zeros((len(x), len(weight)), x.dtype)  # (L, out)
    for i in range(0, x.shape[1], terms):
        y += x[:, i : i + terms] @ weight[:, i : i + terms].T
    return y


def linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    """x (L, in) times ``name.weight`` transposed, plus ``name.bias`` where it exists: (L, out)."""
    y = matmul(x, w[f"{name}.weight"])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def mamba2_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, sequence_starts: Bools
) -> tuple[Array, Array]:
    """h = exp(dt A) h + dt x ⊗ B, y = h C, token by token (2405.21060, equation 2).

    x (L, H, P), dt (L, H), A (H,), B and C (L, G, N), h (H, P, N): y (L, H, P) and h after the last token.
    """
    L, H, _ = x.shape
    B, C = (np.repeat(v, H // v.shape[1], axis=1) for v in (B, C))  # (L, H, N)
    y = np.empty_like(x)
    for t in range(L):
        decay = np.exp(dt[t] * A) * (not sequence_starts[t])  # (H,)
        dBx = (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]  # (H, P, N)
        h = decay[:, None, None] * h + dBx  # (H, P, N)
        y[t] = (h @ C[t, :, :, None])[..., 0]  # (H, P)
    return y, h


def mamba1_scan(
    x: Array, dt: Array, A: Array, B: Array, C: Array, h: Array, sequence_starts: Bools
) -> tuple[Array, Array]:
    """h = exp(dt A) h + dt x ⊗ B, y = h C, token by token (2312.00752, equation 2).

    x and dt (L, I), A (I, N), B and C (L, N), h (I, N): y (L, I) and h after the last token.
    """
    y = np.empty_like(x)
    for t in range(len(x)):
        decay = np.exp(dt[t, :, None] * A) * (not sequence_starts[t])  # (I, N)
        h = decay * h + (dt[t] * x[t])[:, None] * B[t]  # (I, N)
        y[t] = h @ C[t]  # (I,)
    return y, h
