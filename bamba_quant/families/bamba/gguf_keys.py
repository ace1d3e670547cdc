"""The GGUF keys of Bamba, ``granitehybrid`` in llama.cpp (src/models/granite-hybrid.cpp)."""

from __future__ import annotations

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import KeyValues, array, boolean, uint32
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config


def write(config: Config) -> Metadata:
    """What llama.cpp reads for ``granitehybrid`` (granite-hybrid.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if "attention" in layer.blocks else 0 for layer in config.layers]
    return {
        **shared.shape(config),
        "feed_forward_length": uint32(config.intermediate_size),
        **shared.attention(config),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        "rope.dimension_count": uint32(config.rotary_dim),
        # llama.cpp reads this key as the switch of the rotary embedding.
        "rope.scaling.finetuned": boolean(True),
        **shared.mamba2(config),
    }


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph for ``granitehybrid`` cannot represent."""
    limitations.check(
        (
            limitations.expansion(config),
            *limitations.mixer(config),
            *limitations.common(config),
            (
                "attn_layer_indices",
                list(config.attention_layers),
                bool(config.attention_layers),
                "at least one attention layer (a model without any is a Mamba-2 model)",
            ),
            (
                "layer_types",
                "attention in every layer",
                bool(config.mamba_layers),
                "at least one Mamba layer",
            ),
        )
    )
    return ()


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    reader = shared.Reader(values, tensors)
    attention = reader.attention()
    return Config(
        **reader.shape(),
        intermediate_size=reader.count("feed_forward_length"),
        **attention,
        rotary_dim=reader.rotary_dim(attention["head_dim"]),
        mlp_bias=reader.has_bias("ffn_up"),
        **reader.mamba2(),
    )
