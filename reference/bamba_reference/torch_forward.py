"""What a Bamba model computes, in torch: the same definition as ``numpy_forward``, batched, on any device.

The structure and the names are ``numpy_forward``'s, where the sources of the formulas are given. Activations
and weights have the model's dtype; what ``torch_ops`` calls wide is float32 at least, logits included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_reference.backend import TORCH, Backend
from bamba_reference.config import Config
from bamba_reference.numpy_forward import rotary_angles
from bamba_reference.packing import InputError, Layout, check_tokens, layout
from bamba_reference.state import AttentionState, MambaState, State, empty_mamba
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
from bamba_reference.torch_ops import wide

# A product with one of the current layer's matrices, by the matrix's name within the layer.
Linear = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A configuration with its weights as tensors by Hugging Face name, on one device.

    ``dtype`` is that of the matrices and of the activations; ``stored_dtype`` has each tensor's. ``chunk`` is
    the scan's, chosen for the device and not the checkpoint's: chunking is exact.
    """

    config: Config
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    chunk: int


@dataclass(frozen=True)
class Output:
    """What a pass gives: ``logits`` (B, kept, V), float32 at least.

    ``hidden_states``, each (B, L, d), stand before every layer and after the last; ``last_hidden`` is the
    last of them after the final norm, which the head multiplies.
    """

    logits: Tensor
    last_hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Sequences:
    """A ``packing.Layout`` as the layers read it: tensors on the model's device."""

    cos: Tensor  # (B or 1, L, rotary_dim / 2), wide
    sin: Tensor
    fresh: Tensor | None  # (B, L)
    real: Tensor | None  # (B, L)
    starts: Tensor | None  # (B,)
    packed: list[tuple[int, int, int]] | None  # (row, start, stop)


def default_chunk(device: torch.device) -> int:
    """32 on a CPU, where it was the fastest measured; 64 elsewhere, for fewer and larger operations."""
    return 32 if device.type == "cpu" else 64


def load(
    config: Config,
    weights: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: Backend = TORCH,
    chunk: int | None = None,
) -> Model:
    """Bring weights, numpy arrays or tensors of any float dtype, to their dtypes and one device.

    Raises ``TensorError`` where they do not fit the configuration. Tensors already right are shared, not
    copied, so that gradients reach them.
    """
    check_names(config, weights)
    device = torch.device(device)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        tensors[name] = to_tensor(weights[name], stored_dtype(name, dtype), device)
        check_shape(name, tensors[name].shape, shape)
    return Model(config, backend.arrange(tensors), dtype, device, backend, chunk or default_chunk(device))


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of ``dtype`` holds a tensor: wide for what only enters wide arithmetic.

    These are the norms, the convolution and dt_bias, A_log and D, whose rounding would be of no use.
    """
    return (
        wide(dtype)
        if name.endswith(("norm.weight", "dt_bias", "A_log", "mamba.D")) or "conv1d" in name
        else dtype
    )


def to_tensor(array: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from a tensor or a numpy array, whose dtype may be one of ``ml_dtypes``' (bfloat16, …)."""
    if isinstance(array, Tensor):
        return array.to(device=device, dtype=dtype)
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.kind == "V" or not hasattr(np, array.dtype.name):
        raw = torch.from_numpy(array.view(np.dtype(f"u{array.dtype.itemsize}")))
        return raw.view(getattr(torch, array.dtype.name)).to(device=device, dtype=dtype)
    return torch.from_numpy(array).to(device=device, dtype=dtype)


def forward(
    model: Model,
    tokens: Any,
    *,
    state: State | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    seq_idx: Any = None,
    cu_seq_lens: Any = None,
    logits_to_keep: int | Tensor = 0,
    hidden_states: bool = False,
) -> Output:
    """Run tokens (B, L) of integers through the model.

    ``state`` (``new_state``) is read and brought up to date, so that a prompt may come in pieces and
    decoding go on from it. ``attention_mask`` (1 for tokens) allows padding on the left; ``position_ids``,
    ``seq_idx`` and ``cu_seq_lens`` describe packed sequences: ``packing.layout`` has the shapes.
    ``logits_to_keep`` is a number of last tokens, 0 for all, or a tensor of places. Raises ``InputError``
    for what cannot be run.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if ids.dim() != 2:
        raise InputError("tokens are not a batch", found=f"shape {tuple(ids.shape)}", expected="shape (B, L)")
    check_tokens(ids.cpu().numpy(), model.config.vocab_size)
    B, L = ids.shape
    if state is not None:
        state.check(B)
    where = layout(
        (B, L),
        past=state.length if state else 0,
        starts=state.starts if state else None,
        attention_mask=_host(attention_mask),
        position_ids=_host(position_ids),
        seq_idx=_host(seq_idx),
        cu_seq_lens=_host(cu_seq_lens),
    )
    sequences = prepare(model.config, where, model.dtype, model.device)
    x = embed(model, ids.to(model.device))  # (B, L, d)
    trace = [x]
    for i in range(model.config.num_hidden_layers):
        x = layer(model, i, x, sequences, state.layers[i] if state else None)
        if hidden_states:
            trace.append(x)
    if state is not None:
        state.length, state.starts = state.length + L, where.starts
    last = model.backend.rms_norm(x, model.weights[FINAL_NORM], model.config.rms_norm_eps)
    kept = last[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else last[:, logits_to_keep]
    return Output(head(model, kept), last, tuple(trace) if hidden_states else None)


def new_state(model: Model, batch: int) -> State:
    """The state of ``batch`` rows before their first token."""
    return State(model.config, batch, model.dtype, model.device)


def prepare(config: Config, where: Layout, dtype: torch.dtype, device: torch.device) -> Sequences:
    """Rotary factors and masks, once for all layers."""
    # Rows that stand at the same places, as all do without packing and padding, share one row of angles.
    same = (where.positions == where.positions[:1]).all()
    positions = where.positions[:1] if same else where.positions  # (B or 1, L)
    angles = torch.from_numpy(rotary_angles(config, positions))  # (B or 1, L, r/2)
    packed = None
    if where.fresh is not None:
        packed = []
        for row, marks in enumerate(where.fresh):
            borders = [*marks.nonzero()[0].tolist(), len(marks)]
            packed += [(row, start, stop) for start, stop in pairwise(borders)]
    return Sequences(
        cos=angles.cos().to(device, wide(dtype)),
        sin=angles.sin().to(device, wide(dtype)),
        fresh=None if where.fresh is None else torch.from_numpy(where.fresh).to(device),
        real=None if where.real is None else torch.from_numpy(where.real).to(device),
        starts=torch.from_numpy(where.starts).to(device) if where.starts.any() else None,
        packed=packed,
    )


def layer(
    model: Model,
    index: int,
    x: Tensor,
    sequences: Sequences,
    state: MambaState | AttentionState | None = None,
) -> Tensor:
    """One layer on x (B, L, d): the mixer or attention, then the MLP, each added to the stream."""
    config, ops, prefix = model.config, model.backend, layer_prefix(index)
    w = {name: model.weights[prefix + name] for name in layer_tensors(config, index)}

    def given(name: str) -> tuple[Tensor, Tensor | None, str]:
        return w[f"{name}.weight"], w.get(f"{name}.bias"), f"{prefix}{name}.weight"

    def linear(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, *given(name))

    u = ops.rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)  # (B, L, d)
    if config.layer_types[index] == "attention":
        mixed = attention(model, linear, u, sequences, state if isinstance(state, AttentionState) else None)
    else:
        mixed = mixer(model, w, linear, u, sequences, state if isinstance(state, MambaState) else None)
    norm = w["pre_ff_layernorm.weight"], config.rms_norm_eps
    if ops.add_norm is None:
        x = x + mixed
        u = ops.rms_norm(x, *norm)  # (B, L, d)
    else:
        x, u = ops.add_norm(x, mixed, *norm)
    if ops.gate_up is None:
        gated = ops.swiglu(linear("feed_forward.gate_proj", u), linear("feed_forward.up_proj", u))
    else:
        gated = ops.gate_up(u, given("feed_forward.gate_proj"), given("feed_forward.up_proj"))  # (B, L, ffn)
    if ops.add_linear is None:
        return x + linear("feed_forward.down_proj", gated)
    return ops.add_linear(x, gated, *given("feed_forward.down_proj"))


def mixer(
    model: Model,
    w: Mapping[str, Tensor],
    linear: Linear,
    u: Tensor,
    sequences: Sequences,
    state: MambaState | None,
) -> Tensor:
    """The Mamba-2 mixer on u (B, L, d)."""
    config, ops = model.config, model.backend
    H, P, G, N = config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state
    inner = config.mamba_d_inner
    zxBCdt = linear("mamba.in_proj", u)  # (B, L, I + (I + 2GN) + H), in the order z | x, B, C | dt
    z, xBC, dt = zxBCdt.split([inner, config.mamba_conv_dim, H], dim=-1)
    if sequences.real is not None:
        xBC = xBC * sequences.real[..., None]
    now = state or empty_mamba(config, len(u), u.dtype, u.device)
    convolved = ops.conv(
        xBC, w["mamba.conv1d.weight"][:, 0], w.get("mamba.conv1d.bias"), now.tail, sequences.fresh
    )
    x, B, C = convolved.split([inner, G * N, G * N], dim=-1)
    y, h = ops.scan(
        x.unflatten(-1, (H, P)),  # (B, L, H, P)
        dt,
        w["mamba.A_log"],
        B.unflatten(-1, (G, N)),  # (B, L, G, N)
        C.unflatten(-1, (G, N)),
        w["mamba.D"],
        w["mamba.dt_bias"],
        config.time_step_limit,
        now.h,
        model.chunk,
        sequences.fresh,
        sequences.real,
    )
    if state is not None:
        state.tail, state.h = ops.next_tail(state.tail, xBC), h.detach()
    y = ops.gated_norm(y.flatten(2), z, w["mamba.norm.weight"], G, config.rms_norm_eps)  # (B, L, I)
    return linear("mamba.out_proj", y)


def attention(
    model: Model, linear: Linear, u: Tensor, sequences: Sequences, state: AttentionState | None
) -> Tensor:
    """Causal grouped-query attention on u (B, L, d)."""
    config, ops = model.config, model.backend
    q, k, v = (
        linear(f"self_attn.{name}_proj", u).unflatten(-1, (-1, config.head_dim)) for name in "qkv"
    )  # (B, L, heads, E), (B, L, kv, E), (B, L, kv, E)
    q, k = ops.rotary(q, sequences.cos, sequences.sin), ops.rotary(k, sequences.cos, sequences.sin)
    if state is not None:
        k, v = state.append(k, v)  # (B, S, kv, E)
    y = ops.attention(q, k, v, config.head_dim**-0.5, sequences.starts, sequences.packed)  # (B, L, heads, E)
    return linear("self_attn.o_proj", y.flatten(2))


def embed(model: Model, ids: Tensor) -> Tensor:
    """Hidden states (B, L, d) before the first layer, of ids (B, L) on the model's device."""
    return F.embedding(ids, model.weights[EMBEDDING])


def head(model: Model, x: Tensor) -> Tensor:
    """Logits (…, V), wide, of final hidden states x (…, d)."""
    name = head_name(model.config)
    return model.backend.head(x, model.weights[name], name)


def _host(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
