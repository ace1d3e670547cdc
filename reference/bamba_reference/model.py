"""What a model of the family computes, in numpy, one sequence at a time: the definition that faster code is tested by.

From top to bottom: the five blocks (Mamba-2, Mamba, attention, MLP, mixture of experts), then the forward pass. It puts
them together as transformers' ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``, ``modeling_jamba.py``,
``modeling_falcon_h1.py``, ``modeling_nemotron_h.py``, ``modeling_mamba2.py``, ``modeling_mamba.py`` and
``modeling_falcon_mamba.py`` do. The elementary operations and the recurrences are in ``numpy_ops``, the choice of
experts in ``routing``.

Shapes: L tokens, d hidden size, V vocabulary; each block names its own. All arrays have one dtype, float32 or float64.
A block is a function of the configuration, the layer's tensors by their names (``tensors``), the normed hidden states
u (L, d), its state after the tokens before (None before the first) and ``Tokens``; it returns what is added to the
residual stream, (L, d), and its new state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bamba_reference import chunked_scan, tensors
from bamba_reference.config import Block, Config
from bamba_reference.numpy_ops import (
    Array,
    activated,
    linear,
    mamba1_scan,
    mamba2_scan,
    matmul,
    rms_norm,
    silu,
    softmax,
    softplus,
)
from bamba_reference.packing import Bools, InputError, Ints, check_tokens, layout
from bamba_reference.routing import routed

Weights = Mapping[str, Array]

# What a block keeps of the tokens so far: two arrays, which its docstring names; None before the first token and for
# blocks that keep nothing.
BlockState = tuple[Array, Array] | None
Result = tuple[Array, BlockState]


@dataclass(frozen=True)
class Tokens:
    """What a block needs to know about the L tokens besides their hidden states.

    ``positions`` (L,) are those of the rotary embedding. ``sequence_starts`` (L,) is true for the first token of each
    packed sequence, which reads nothing before it. ``chunk`` is the chunk size of scans, None for token by token; it
    changes rounding errors only.
    """

    positions: Ints
    sequence_starts: Bools
    chunk: int | None


def causal_conv(w: Weights, x: Array, tail: Array | None, sequence_starts: Bools) -> tuple[Array, Array]:
    """SiLU of a depthwise convolution: out[t] = bias + Σ_k weight[:, k] in[t - (K-1) + k] over x (L, channels).

    ``tail`` (K-1, channels) holds the inputs before x, zeros by default. Inputs from before the start of a token's
    sequence count as zeros. Returns the outputs (L, channels) and the new tail.
    """
    weight, bias = w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias")  # (channels, K), (channels,)
    L, K = len(x), weight.shape[1]
    inputs = np.concatenate([np.zeros((K - 1, x.shape[1]), x.dtype) if tail is None else tail, x])
    # The tail belongs to the first token's sequence unless a new one starts there.
    segment = np.concatenate([np.zeros(K - 1, int), np.cumsum(sequence_starts)])  # (K-1+L,)
    out = np.zeros_like(x) if bias is None else np.tile(bias, (L, 1))  # (L, channels)
    for k in range(K):
        seen = segment[k : k + L] == segment[K - 1 :]  # (L,)
        out += np.where(seen[:, None], inputs[k : k + L], 0) * weight[:, k]
    return silu(out), inputs[L:]


def mamba2(config: Config, w: Weights, u: Array, state: BlockState, tokens: Tokens) -> Result:
    """Mamba-2's state-space block (Dao and Gu 2024, "Transformers are SSMs", 2405.21060).

    H heads of size P, state size N, G groups of heads that share B and C, I = H P. The state: the last inputs of the
    convolution (K-1, I+2GN) and h (H, P, N).
    """
    L, inner = len(u), config.mamba_d_inner
    H, P, G, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state
    tail, h = state or (None, np.zeros((H, P, N), u.dtype))
    zxBCdt = linear(w, "mamba.in_proj", u * config.ssm_in_multiplier)  # (L, I + (I + 2GN) + H)
    sections = [inner, inner, G * N, G * N, H]  # z | x, B, C | dt
    zxBCdt = zxBCdt * np.repeat(np.array(config.ssm_multipliers, u.dtype), sections)
    z, xBC, dt = np.split(zxBCdt, [inner, inner + config.mamba_conv_dim], axis=-1)
    xBC, tail = causal_conv(w, xBC, tail, tokens.sequence_starts)
    x, B, C = np.split(xBC, [inner, inner + G * N], axis=-1)
    x, B, C = x.reshape(L, H, P), B.reshape(L, G, N), C.reshape(L, G, N)  # head h reads group h // (H / G)
    dt = np.clip(softplus(dt + w["mamba.dt_bias"]), *map(u.dtype.type, config.time_step_limit))  # (L, H)
    A = -np.exp(w["mamba.A_log"])  # (H,)
    scan = (x, dt, A, B, C, h, tokens.sequence_starts)
    y, h = mamba2_scan(*scan) if tokens.chunk is None else chunked_scan.mamba2_scan(*scan, tokens.chunk)
    y = y + w["mamba.D"][:, None] * x  # (L, H, P)
    # The gate comes before the norm, and each group of heads is normalized alone (norm_before_gate = False).
    y = (y.reshape(L, inner) * silu(z)).reshape(L, G, inner // G)
    if config.mamba_rms_norm:
        y = rms_norm(y, w["mamba.norm.weight"].reshape(G, inner // G), config.rms_norm_eps)
    return linear(w, "mamba.out_proj", y.reshape(L, inner)) * config.ssm_out_multiplier, (tail, h)


def mamba1(config: Config, w: Weights, u: Array, state: BlockState, tokens: Tokens) -> Result:
    """Mamba's selective state-space block (Gu and Dao 2023, "Mamba", 2312.00752, algorithm 2 and section 3.3).

    There are no heads: each of I channels has a state (N,) and a dt of its own; B, C and the R elements that dt is
    computed from are projections of the convolved x. FalconMamba normalizes the three without weights, Jamba with. The
    state: the last inputs of the convolution (K-1, I) and h (I, N).
    """
    inner, N, R = config.mamba_d_inner, config.mamba_d_state, config.mamba_time_step_rank
    tail, h = state or (None, np.zeros((inner, N), u.dtype))
    x, z = np.split(linear(w, "mamba.in_proj", u), [inner], axis=-1)  # (L, I) each
    x, tail = causal_conv(w, x, tail, tokens.sequence_starts)
    dt, B, C = np.split(linear(w, "mamba.x_proj", x), [R, R + N], axis=-1)  # (L, R), (L, N), (L, N)
    if config.mixer_rms_eps is not None:
        norms = zip((dt, B, C), tensors.MIXER_NORMS, strict=True)
        dt, B, C = (rms_norm(v, w.get(name), config.mixer_rms_eps) for v, name in norms)
    dt = softplus(linear(w, "mamba.dt_proj", dt))  # (L, I)
    A = -np.exp(w["mamba.A_log"])  # (I, N)
    scan = (x, dt, A, B, C, h, tokens.sequence_starts)
    y, h = mamba1_scan(*scan) if tokens.chunk is None else chunked_scan.mamba1_scan(*scan, tokens.chunk)
    y = (y + w["mamba.D"] * x) * silu(z)  # (L, I)
    return linear(w, "mamba.out_proj", y), (tail, h)


def attention(config: Config, w: Weights, u: Array, state: BlockState, tokens: Tokens) -> Result:
    """Causal attention with grouped queries (Ainslie et al. 2023, 2305.13245), rotary where ``rotary_dim`` > 0.

    Heads of size E: ``heads`` for queries, ``kv`` for keys and values. The state: the keys and values (S, kv, E) of
    all tokens so far.
    """
    L, heads, kv, E = len(u), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    u = u * config.attention_in_multiplier
    q = linear(w, "self_attn.q_proj", u).reshape(L, heads, E)
    k = linear(w, "self_attn.k_proj", u).reshape(L, kv, E) * config.key_multiplier
    v = linear(w, "self_attn.v_proj", u).reshape(L, kv, E)
    q, k = rotary(q, tokens.positions, config), rotary(k, tokens.positions, config)
    if state is not None:
        k, v = np.concatenate([state[0], k]), np.concatenate([state[1], v])  # (S, kv, E)
    S = len(k)
    keys, values = (np.repeat(t, heads // kv, axis=1) for t in (k, v))  # (S, heads, E)
    scores = q.transpose(1, 0, 2) @ keys.transpose(1, 2, 0)  # (heads, L, S)
    scores = scores * u.dtype.type(config.attention_scale)
    segment = np.concatenate([np.zeros(S - L, int), np.cumsum(tokens.sequence_starts)])  # (S,)
    sees = np.tril(segment[S - L :, None] == segment[None, :], S - L)  # (L, S)
    p = softmax(np.where(sees, scores, -np.inf))  # (heads, L, S)
    y = (p @ values.transpose(1, 0, 2)).transpose(1, 0, 2)  # (L, heads, E)
    return linear(w, "self_attn.o_proj", y.reshape(L, heads * E)) * config.attention_out_multiplier, (k, v)


def rotary_angles(config: Config, positions: Ints) -> Array:
    """(…, rotary_dim / 2) angles in float64: in float32 they would be off by 3e-5 at position 1,000."""
    r = config.rotary_dim
    return positions[..., None] * config.rope_theta ** (-np.arange(0, r, 2, dtype=np.float64) / r)


def rotary(x: Array, positions: Ints, config: Config) -> Array:
    """Rotate the pairs (i, i + r/2) of each head's first r = rotary_dim elements (Su et al. 2021, 2104.09864).

    x (L, heads, E); the elements from r on stay as they are.
    """
    half = config.rotary_dim // 2
    angle = rotary_angles(config, positions)[:, None, :]  # (L, 1, r/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def mlp(config: Config, w: Weights, u: Array, state: BlockState, tokens: Tokens) -> Result:
    """A feed-forward network: down(activated(gate(u), up(u))), with or without a gate."""
    before, after = config.mlp_multipliers
    gate = linear(w, "feed_forward.gate_proj", u) * before if config.has_gate else None  # (L, ffn)
    y = linear(w, "feed_forward.down_proj", activated(gate, linear(w, "feed_forward.up_proj", u)))
    return y * after, None


def moe(config: Config, w: Weights, u: Array, state: BlockState, tokens: Tokens) -> Result:
    """A mixture of experts (Shazeer et al. 2017, 1701.06538, section 2.1), each of them an ``mlp`` without biases.

    Each token uses ``num_experts_per_tok`` of E experts: ``routing`` says which, and with which weights. Latent
    experts read and write a projection of the hidden states (transformers' ``modeling_nemotron_h.py``).
    """
    chosen, weights = routed(config, w, matmul(u, w["moe.router.weight"]))  # (L, k), (L, k)
    x = matmul(u, w["moe.latent_down.weight"]) if config.moe_latent_size else u  # (L, d or R)
    y = np.zeros_like(x)
    for e in np.unique(chosen):
        token, rank = np.nonzero(chosen == e)  # (n,), (n,)
        gate = matmul(x[token], w["moe.gate_proj.weight"][e]) if config.has_gate else None
        hidden = activated(gate, matmul(x[token], w["moe.up_proj.weight"][e]))  # (n, I)
        y[token] += weights[token, rank, None] * matmul(hidden, w["moe.down_proj.weight"][e])
    return matmul(y, w["moe.latent_up.weight"]) if config.moe_latent_size else y, None


BLOCKS: dict[Block, Callable[[Config, Weights, Array, BlockState, Tokens], Result]] = {
    "mamba2": mamba2,
    "mamba1": mamba1,
    "attention": attention,
    "mlp": mlp,
    "moe": moe,
}


@dataclass
class NumpyState:
    """The states of all blocks, by layer and block, after ``length`` tokens."""

    blocks: dict[tuple[int, Block], BlockState] = field(default_factory=dict)
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
    chunk: int | None = 32,
    state: NumpyState | None = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
    logits_to_keep: int = 0,
    hidden_states: bool = False,
) -> NumpyOutput:
    """Run tokens (L,) through the model in float32 or float64; logits have that dtype too.

    ``weights`` maps the names in ``tensors`` to arrays of any float dtype numpy can convert; nothing is kept of it.
    ``chunk`` is described in ``Tokens``. ``state`` is read and updated. ``position_ids``, ``seq_idx`` and
    ``cu_seq_lens`` describe packed sequences (``packing.layout``). ``logits_to_keep`` > 0 computes the logits of that
    many last tokens only. Raises ``TensorError`` for weights that do not fit the configuration and ``InputError`` for
    tokens or positions that cannot be run.
    """
    ids = np.asarray(tokens, dtype=np.int64)  # (L,)
    if ids.ndim != 1:
        raise InputError("tokens are not one sequence", found=f"shape {ids.shape}", expected="shape (L,)")
    tensors.check_names(config, weights)
    check_tokens(ids, config.vocab_size)
    L, past = len(ids), state.length if state else 0
    batch = layout((1, L), past=past, position_ids=position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens)
    starts = np.zeros(L, bool) if batch.sequence_starts is None else batch.sequence_starts[0]
    sequence = Tokens(batch.positions[0], starts, chunk)
    shapes = tensors.tensor_shapes(config)

    def read(name: str) -> Array:
        array = np.asarray(weights[name], dtype)
        tensors.check_shape(name, array.shape, shapes[name])
        return array

    x = read(tensors.EMBEDDING)[ids] * config.embedding_multiplier  # (L, d), the residual stream
    trace = [x]
    for i, steps in enumerate(config.layers):
        w = {name: read(tensors.layer_prefix(i) + name) for name in tensors.layer_tensors(config, i)}
        for norm, blocks in zip(tensors.NORMS, steps, strict=True):
            if not blocks:
                continue
            u = rms_norm(x, w[norm], config.rms_norm_eps)  # (L, d)
            outputs = []  # (L, d) each
            for block in blocks:
                before = state.blocks.get((i, block)) if state else None
                y, after = BLOCKS[block](config, w, u, before, sequence)
                outputs.append(y)
                if state:
                    state.blocks[i, block] = after
            x = x + config.residual_multiplier * sum(outputs[1:], outputs[0])
        trace.append(x)
    if state:
        state.length = past + L
    x = rms_norm(x[-logits_to_keep:], read(tensors.FINAL_NORM), config.rms_norm_eps)
    logits = matmul(x, read(tensors.head_name(config))) / config.logits_scaling  # (kept, V)
    return NumpyOutput(logits=logits, hidden_states=tuple(trace) if hidden_states else None)
