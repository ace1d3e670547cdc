"""What a Bamba model computes, in numpy, one sequence at a time: the definition the faster paths are judged
by.

Sources: the state-space layer is Mamba-2's (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060: the
recurrence is equation 2, the chunked form section 6 and listing 1); rotary embedding, Su et al. 2021
(2104.09864); grouped queries, Ainslie et al. 2023 (2305.13245); SwiGLU, Shazeer 2020 (2002.05202). How the
parts are put together follows transformers' ``modeling_bamba.py``.

Shapes: L tokens, d hidden size; state-space heads H of size P, state size N, G groups sharing B and C, I = H
* P; attention heads of size E, ``heads`` for queries and ``kv`` for keys and values; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bamba_reference.config import Config
from bamba_reference.packing import Bools, InputError, Ints, check_tokens, layout
from bamba_reference.tensors import (
    EMBEDDING,
    FINAL_NORM,
    check_names,
    check_shape,
    head_name,
    layer_prefix,
    layer_tensors,
    tensor_shapes,
)

Array = npt.NDArray[Any]
Scan = Literal["chunked", "sequential"]


@dataclass
class NumpyState:
    """What the tokens so far leave: in each layer (conv inputs (K-1, I+2GN), h (H, P, N)) or (k, v)."""

    layers: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    length: int = 0


@dataclass(frozen=True)
class NumpyOutput:
    """``logits`` (kept, V); ``hidden_states``, each (L, d): before every layer and after the last."""

    logits: Array
    hidden_states: tuple[Array, ...] | None


def forward(
    config: Config,
    weights: Mapping[str, Any],
    tokens: Any,
    *,
    dtype: npt.DTypeLike = np.float64,
    scan: Scan = "chunked",
    chunk: int = 32,
    state: NumpyState | None = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
    logits_to_keep: int = 0,
    hidden_states: bool = False,
) -> NumpyOutput:
    """Run tokens (L,) through the model in float32 or float64; logits come in that dtype too.

    ``weights`` maps Hugging Face names to arrays of any float dtype numpy can convert; nothing is kept of
    it. ``scan`` and ``chunk`` choose how the recurrence is computed, not what. ``state`` is read and brought
    up to date. ``position_ids``, ``seq_idx``, ``cu_seq_lens`` describe packed sequences
    (``packing.layout``). ``logits_to_keep`` > 0 computes the logits of that many last tokens only. Raises
    ``TensorError`` for weights that do not fit the configuration and ``InputError`` for tokens or positions
    that cannot be run.
    """
    tokens = np.asarray(tokens, dtype=np.int64)  # (L,)
    if tokens.ndim != 1:
        raise InputError("tokens are not one sequence", found=f"shape {tokens.shape}", expected="shape (L,)")
    check_names(config, weights)
    check_tokens(tokens, config.vocab_size)
    L, past = len(tokens), state.length if state else 0
    where = layout((1, L), past=past, position_ids=position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens)
    fresh = None if where.fresh is None else where.fresh[0]
    before = state.layers if state else {}
    shapes = tensor_shapes(config)

    def read(name: str) -> Array:
        array = np.asarray(weights[name], dtype)
        check_shape(name, array.shape, shapes[name])
        return array

    x = read(EMBEDDING)[tokens]  # (L, d)
    trace = [x]
    for i, kind in enumerate(config.layer_types):
        w = {name: read(layer_prefix(i) + name) for name in layer_tensors(config, i)}
        u = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)  # (L, d)
        if kind == "mamba":
            mixed, after = mixer(config, w, u, before.get(i), fresh, scan, chunk)
        else:
            mixed, after = attention(config, w, u, before.get(i), fresh, where.positions[0])
        x = x + mixed
        x = x + mlp(w, rms_norm(x, w["pre_ff_layernorm.weight"], config.rms_norm_eps))
        trace.append(x)
        if state:
            state.layers[i] = after
    if state:
        state.length = past + L
    x = rms_norm(x[-logits_to_keep:], read(FINAL_NORM), config.rms_norm_eps)
    logits = product(x, read(head_name(config)))  # (kept, V)
    return NumpyOutput(logits=logits, hidden_states=tuple(trace) if hidden_states else None)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Zhang and Sennrich 2019 (1910.07467), over the last dimension."""
    rms: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps))  # (…, 1)
    return x / rms * weight


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large -x is infinite and the quotient rightly zero
        y: Array = x / (1 + np.exp(-x))
    return y


def softplus(x: Array) -> Array:
    y: Array = np.logaddexp(x, x.dtype.type(0))
    return y


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


def mlp(w: Mapping[str, Array], x: Array) -> Array:
    return linear(
        w,
        "feed_forward.down_proj",
        silu(linear(w, "feed_forward.gate_proj", x)) * linear(w, "feed_forward.up_proj", x),
    )


def mixer(
    config: Config,
    w: Mapping[str, Array],
    u: Array,
    before: tuple[Array, Array] | None,
    fresh: Bools | None,
    scan: Scan,
    chunk: int,
) -> tuple[Array, tuple[Array, Array]]:
    """The Mamba-2 mixer on u (L, d), and its state after the last token."""
    L, H, P = len(u), config.mamba_n_heads, config.mamba_d_head
    G, N, K, inner = config.mamba_n_groups, config.mamba_d_state, config.mamba_d_conv, config.mamba_d_inner
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
    if scan == "sequential":
        y, h = sequential_scan(x, dt, A, B, C, h, starts)
    else:
        y, h = chunked_scan(x, dt, A, B, C, h, starts, chunk)
    y = y + w["mamba.D"][:, None] * x  # (L, H, P)
    # The gate comes before the norm, and each group of heads is normalized alone (norm_before_gate = False).
    gated = (y.reshape(L, inner) * silu(z)).reshape(L, G, inner // G)
    y = rms_norm(gated, w["mamba.norm.weight"].reshape(G, inner // G), config.rms_norm_eps)
    return linear(w, "mamba.out_proj", y.reshape(L, inner)), (joined[L:], h)


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


def attention(
    config: Config,
    w: Mapping[str, Array],
    u: Array,
    before: tuple[Array, Array] | None,
    fresh: Bools | None,
    positions: Ints,
) -> tuple[Array, tuple[Array, Array]]:
    """Causal grouped-query attention on u (L, d), and all keys and values (S, kv, E) up to the last token."""
    L, heads, kv, E = len(u), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = rotary(linear(w, "self_attn.q_proj", u).reshape(L, heads, E), positions, config)  # (L, heads, E)
    k = rotary(linear(w, "self_attn.k_proj", u).reshape(L, kv, E), positions, config)  # (L, kv, E)
    v = linear(w, "self_attn.v_proj", u).reshape(L, kv, E)
    if before is not None:
        k, v = np.concatenate([before[0], k]), np.concatenate([before[1], v])  # (S, kv, E)
    S = len(k)
    keys, values = (np.repeat(t, heads // kv, axis=1) for t in (k, v))  # (S, heads, E)
    scores = q.transpose(1, 0, 2) @ keys.transpose(1, 2, 0) * u.dtype.type(E**-0.5)  # (heads, L, S)
    segment = np.zeros(L, int) if fresh is None else np.cumsum(fresh)
    segment = np.concatenate([np.zeros(S - L, int), segment])  # (S,)
    sees = np.tril(segment[S - L :, None] == segment[None, :], S - L)  # (L, S)
    scores = np.where(sees, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)  # (heads, L, S)
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
