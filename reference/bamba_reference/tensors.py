"""The names and shapes of all tensors of a model, and the check that a mapping has exactly these.

All families share one set of names: Bamba's in transformers (``BambaForCausalLM``) where it has the tensor,
``model.final_layernorm.weight`` for every final norm, ``model.layers.{i}.mamba.*`` for every state-space layer. A
tied model has no ``lm_head.weight``. Names of the reference's own, E experts of width I:
``moe.router.weight`` (E, d), ``moe.gate_proj.weight`` and ``moe.up_proj.weight`` (E, I, d),
``moe.down_proj.weight`` (E, d, I), beside which ``feed_forward.*`` is the network that Granite calls shared. A sigmoid
router has ``moe.router.correction`` (E,). Latent experts have d = R inside ``moe.latent_down.weight`` (R, d) and
``moe.latent_up.weight`` (d, R). Without a gate there is no ``gate_proj``.
Mamba's ``in_proj`` has the rows x, z; Mamba-2's z, x, B, C, dt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bamba_reference.config import Block, Config
from bamba_reference.errors import BambaQuantError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.final_layernorm.weight"
HEAD = "lm_head.weight"
# The norms before the two steps of a layer, within the layer.
NORMS = ("input_layernorm.weight", "pre_ff_layernorm.weight")
# Of what Mamba's dt is computed from, and of B and C.
MIXER_NORMS = ("mamba.dt_layernorm.weight", "mamba.b_layernorm.weight", "mamba.c_layernorm.weight")

# Endings of the names of tensors that are used in float32 arithmetic only, so that 16 bits would save nothing.
WIDE = (
    "layernorm.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_proj.bias",
    "mamba.dt_bias",
    "mamba.A_log",
    "mamba.D",
    "mamba.norm.weight",
    "moe.router.weight",
    "moe.router.correction",
)


class TensorError(BambaQuantError):
    """Weights that do not fit their configuration: a tensor missing, too many, or of another shape."""


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _convolution(c: Config) -> Shapes:
    weight: Shapes = {"mamba.conv1d.weight": (c.mamba_conv_dim, 1, c.mamba_d_conv)}
    return weight | {"mamba.conv1d.bias": (c.mamba_conv_dim,)} if c.mamba_conv_bias else weight


def _mamba2(c: Config) -> Shapes:
    H, inner = c.mamba_n_heads, c.mamba_d_inner
    return {
        **_linear("mamba.in_proj", c.mamba_in_proj_dim, c.hidden_size, c.mamba_proj_bias),
        **_convolution(c),
        "mamba.dt_bias": (H,),
        "mamba.A_log": (H,),
        "mamba.D": (H,),
        **({"mamba.norm.weight": (inner,)} if c.mamba_rms_norm else {}),
        **_linear("mamba.out_proj", c.hidden_size, inner, c.mamba_out_bias),
    }


def _mamba1(c: Config) -> Shapes:
    inner, N, R = c.mamba_d_inner, c.mamba_d_state, c.mamba_time_step_rank
    return {
        **_linear("mamba.in_proj", c.mamba_in_proj_dim, c.hidden_size, c.mamba_proj_bias),
        **_convolution(c),
        **_linear("mamba.x_proj", R + 2 * N, inner, bias=False),
        **_linear("mamba.dt_proj", inner, R, bias=True),
        "mamba.A_log": (inner, N),
        "mamba.D": (inner,),
        **_linear("mamba.out_proj", c.hidden_size, inner, c.mamba_proj_bias),
        **(dict(zip(MIXER_NORMS, ((R,), (N,), (N,)), strict=True)) if c.mixer_norm_weights else {}),
    }


def _attention(c: Config) -> Shapes:
    d, queries, keys = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        **_linear("self_attn.q_proj", queries, d, c.attention_bias),
        **_linear("self_attn.k_proj", keys, d, c.attention_bias),
        **_linear("self_attn.v_proj", keys, d, c.attention_bias),
        **_linear("self_attn.o_proj", d, queries, c.attention_bias),
    }


def _mlp(c: Config) -> Shapes:
    gate = _linear("feed_forward.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias)
    return {
        **(gate if c.has_gate else {}),
        **_linear("feed_forward.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
        **_linear("feed_forward.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias),
    }


def _moe(c: Config) -> Shapes:
    E, inner, R = c.num_local_experts, c.expert_intermediate_size, c.moe_latent_size
    d = R or c.hidden_size
    shapes: Shapes = {
        "moe.router.weight": (E, c.hidden_size),
        **({"moe.router.correction": (E,)} if c.expert_scores == "sigmoid" else {}),
        **({"moe.latent_down.weight": (R, c.hidden_size)} if R else {}),
        **({"moe.gate_proj.weight": (E, inner, d)} if c.has_gate else {}),
        "moe.up_proj.weight": (E, inner, d),
        "moe.down_proj.weight": (E, d, inner),
    }
    return shapes | ({"moe.latent_up.weight": (c.hidden_size, R)} if R else {})


_BLOCKS: dict[Block, Callable[[Config], Shapes]] = {
    "mamba2": _mamba2,
    "mamba1": _mamba1,
    "attention": _attention,
    "mlp": _mlp,
    "moe": _moe,
}


def layer_prefix(layer: int) -> str:
    """What every tensor name of this layer begins with."""
    return f"model.layers.{layer}."


def layer_tensors(config: Config, layer: int) -> Shapes:
    """Name within the layer -> shape, for layer ``layer``."""
    shapes: Shapes = {}
    for norm, blocks in zip(NORMS, config.layers[layer], strict=True):
        if blocks:
            shapes[norm] = (config.hidden_size,)
        for block in blocks:
            shapes |= _BLOCKS[block](config)
    return shapes


def tensor_shapes(config: Config) -> Shapes:
    """Full name -> shape, for the whole model in the order of a forward pass."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        shapes |= {prefix + name: shape for name, shape in layer_tensors(config, layer).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def head_name(config: Config) -> str:
    """The tensor that maps hidden states to logits: the embedding where it is tied."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def check_names(config: Config, names: Iterable[str]) -> None:
    """Raise ``TensorError`` unless ``names`` are exactly the model's tensors."""
    expected, found = tensor_shapes(config), set(names)
    missing = [name for name in expected if name not in found]
    unexpected = sorted(found - expected.keys())
    if not missing and not unexpected:
        return
    parts = [f"missing {_listed(missing)}"] if missing else []
    parts += [f"unexpected {_listed(unexpected)}"] if unexpected else []
    raise TensorError(
        "the weights do not fit their configuration",
        found="; ".join(parts),
        expected=f"{len(expected)} tensors for {config.num_hidden_layers} layers; biases in the convolution "
        f"{config.mamba_conv_bias}, in the mixer's projections {config.mamba_proj_bias}, in attention "
        f"{config.attention_bias}, in the MLP {config.mlp_bias}; head "
        + ("tied to the embedding" if config.tie_word_embeddings else "untied"),
        fix="correct config.json, or use the checkpoint it belongs to",
    )


def check_shape(name: str, found: Iterable[int], expected: Shape) -> None:
    """Raise ``TensorError`` unless tensor ``name`` has the ``expected`` shape."""
    if tuple(found) != expected:
        raise TensorError(
            "a tensor has another shape than its configuration implies",
            where=name,
            found=tuple(found),
            expected=expected,
            fix="correct config.json, or use the checkpoint it belongs to",
        )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stack_of(name: str) -> tuple[str, int | None]:
    """The stacked tensor and the expert of a matrix name: ("x.weight", 3) of x.weight[3]; None without an expert."""
    stack, bracket, expert = name.partition("[")
    return stack, int(expert.removesuffix("]")) if bracket else None
