"""Every tensor of a model by name and shape, and the check that a mapping holds exactly these.

All families share one set of names: Bamba's in transformers (``BambaForCausalLM``) where it has the tensor,
``model.final_layernorm.weight`` for every final norm, ``model.layers.{i}.mamba.*`` for every state-space layer. A
tied model has no ``lm_head.weight``. Names of the reference's own, E experts of width I:
``moe.router.weight`` (E, d), ``moe.gate_proj.weight`` and ``moe.up_proj.weight`` (E, I, d),
``moe.down_proj.weight`` (E, d, I), beside which ``feed_forward.*`` is the network that Granite calls shared.
Mamba's ``in_proj`` has the rows x, z; Mamba-2's z, x, B, C, dt.
"""

from __future__ import annotations

from collections.abc import Iterable

from bamba_reference.config import Config
from bamba_reference.errors import BambaQuantError
from bamba_reference.mixers import MIXERS, Shape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.final_layernorm.weight"
HEAD = "lm_head.weight"
# The norms before the two steps of a layer, within the layer.
NORMS = ("input_layernorm.weight", "pre_ff_layernorm.weight")

# Endings of the names of tensors that only enter arithmetic in float32 at least, whose rounding is of no use.
WIDE = (
    "layernorm.weight",
    *sorted({end for mixer in MIXERS.values() for end in mixer.wide}),
)


class TensorError(BambaQuantError):
    """Weights that do not fit their configuration: a tensor missing, too many, or of another shape."""


def layer_prefix(layer: int) -> str:
    """What every tensor name of this layer begins with."""
    return f"model.layers.{layer}."


def layer_tensors(config: Config, layer: int) -> dict[str, Shape]:
    """Name within the layer -> shape, for layer ``layer``."""
    shapes: dict[str, Shape] = {}
    for norm, blocks in zip(NORMS, config.layers[layer], strict=True):
        if blocks:
            shapes[norm] = (config.hidden_size,)
        for block in blocks:
            shapes |= MIXERS[block].tensors(config)
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


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stack_of(name: str) -> tuple[str, int | None]:
    """The tensor that the matrix of a product lies in, and which of its experts that is: x.weight[3] in x.weight."""
    stack, bracket, expert = name.partition("[")
    return stack, int(expert.removesuffix("]")) if bracket else None
