"""The operations that every layer of the definition is made of, in numpy; arrays keep their float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bamba_reference.packing import Bools

Array = npt.NDArray[Any]


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """Zhang and Sennrich 2019 (1910.07467), over the last dimension; without ``weight``, a weight of ones."""
    rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))  # (…, 1)
    normed: Array = x / rms
    return normed if weight is None else normed * weight


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large -x is infinite and the quotient rightly zero
        y: Array = x / (1 + np.exp(-x))
    return y


def softplus(x: Array) -> Array:
    y: Array = np.logaddexp(x, x.dtype.type(0))
    return y


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    p: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p


def linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    y = product(x, w[f"{name}.weight"])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def product(x: Array, weight: Array, terms: int = 64) -> Array:
    """x (L, in) times weight (out, in) transposed, summed in parts.

    In float32 a BLAS that adds up 512 terms in one go errs by 2.9e-7 of the result, enough to leave the
    logits of a trained model further from the truth than transformers'; parts of 64 halve their error.
    """
    y: Array = np.zeros((len(x), len(weight)), x.dtype)  # (L, out)
    for i in range(0, x.shape[1], terms):
        y += x[:, i : i + terms] @ weight[:, i : i + terms].T
    return y


def causal_conv(joined: Array, weight: Array, bias: Array | None, fresh: Bools | None) -> Array:
    """Depthwise: out[t] = bias + sum over k of weight[:, k] * in[t - (K-1) + k], nothing from before a start.

    ``joined`` (K-1+L, channels) begins with the K-1 inputs before the first of L tokens; weight (channels,
    K).
    """
    K = weight.shape[1]
    L = len(joined) - (K - 1)
    segment = np.zeros(L, int) if fresh is None else np.cumsum(fresh)
    # What came before the first token belongs to its sequence unless a new one starts there.
    segment = np.concatenate([np.zeros(K - 1, int), segment])  # (K-1+L,)
    out = np.zeros_like(joined[K - 1 :]) if bias is None else np.tile(bias, (L, 1))  # (L, channels)
    for k in range(K):
        seen = segment[k : k + L] == segment[K - 1 :]  # (L,)
        out += np.where(seen[:, None], joined[k : k + L], 0) * weight[:, k]
    return out
