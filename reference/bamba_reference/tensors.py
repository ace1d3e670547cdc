"""Every tensor of a Bamba model, by Hugging Face name and shape, and the check that a mapping holds exactly
these.

The names are those of transformers' ``BambaForCausalLM``; a tied model has no ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bamba_reference.config import Config
from bamba_reference.errors import BambaQuantError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.final_layernorm.weight"
HEAD = "lm_head.weight"

Shape = tuple[int, ...]


class TensorError(BambaQuantError):
    """Weights that do not fit their configuration: a tensor missing, too many, or of another shape."""


def layer_prefix(layer: int) -> str:
    """What every tensor name of this layer begins with."""
    return f"model.layers.{layer}."


def layer_tensors(config: Config, layer: int) -> dict[str, Shape]:
    """Name within the layer -> shape, for layer ``layer``."""
    d = config.hidden_size
    shapes: dict[str, Shape] = {"input_layernorm.weight": (d,)}
    if config.layer_types[layer] == "mamba":
        H, inner, conv = config.mamba_n_heads, config.mamba_d_inner, config.mamba_conv_dim
        shapes |= _linear("mamba.in_proj", config.mamba_in_proj_dim, d, config.mamba_proj_bias)
        shapes |= {"mamba.conv1d.weight": (conv, 1, config.mamba_d_conv)}
        shapes |= {"mamba.conv1d.bias": (conv,)} if config.mamba_conv_bias else {}
        shapes |= {"mamba.dt_bias": (H,), "mamba.A_log": (H,), "mamba.D": (H,), "mamba.norm.weight": (inner,)}
        shapes |= _linear("mamba.out_proj", d, inner, config.mamba_proj_bias)
    else:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        shapes |= _linear("self_attn.q_proj", queries, d, config.attention_bias)
        shapes |= _linear("self_attn.k_proj", keys, d, config.attention_bias)
        shapes |= _linear("self_attn.v_proj", keys, d, config.attention_bias)
        shapes |= _linear("self_attn.o_proj", d, queries, config.attention_bias)
    shapes |= {"pre_ff_layernorm.weight": (d,)}
    shapes |= _linear("feed_forward.gate_proj", config.intermediate_size, d, config.mlp_bias)
    shapes |= _linear("feed_forward.up_proj", config.intermediate_size, d, config.mlp_bias)
    shapes |= _linear("feed_forward.down_proj", d, config.intermediate_size, config.mlp_bias)
    return shapes


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Full name -> shape, for the whole model in the order in which a forward pass meets them."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        shapes |= {prefix + name: shape for name, shape in layer_tensors(config, layer).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def head_name(config: Config) -> str:
    """The tensor that turns hidden states into logits: the embedding itself where it is tied."""
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
    """Raise ``TensorError`` unless tensor ``name`` has the shape its configuration asks for."""
    if tuple(found) != expected:
        raise TensorError(
            "a tensor has another shape than its configuration asks for",
            where=name,
            found=tuple(found),
            expected=expected,
            fix="correct config.json, or use the checkpoint it belongs to",
        )


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
