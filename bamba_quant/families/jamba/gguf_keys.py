"""The GGUF keys of Jamba: llama.cpp's src/models/jamba.cpp."""

from __future__ import annotations

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import KeyValues, array, uint32
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config


def write(config: Config) -> Metadata:
    """What llama.cpp reads (``load_arch_hparams``; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if "attention" in layer.blocks else 0 for layer in config.layers]
    written = {
        **shared.shape(config),
        **shared.attention(config),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        "feed_forward_length": uint32(config.intermediate_size),
        **shared.mamba1(config),
    }
    if config.num_local_experts:
        written |= {
            "expert_count": uint32(config.num_local_experts),
            "expert_used_count": uint32(config.num_experts_per_tok),
        }
    return written


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph cannot represent."""
    width = config.num_attention_heads * config.head_dim
    limitations.check(
        (
            limitations.expansion(config),
            *limitations.mixer(config),
            *limitations.common(config),
            ("head_dim", config.head_dim, width == config.hidden_size, "hidden_size / num_attention_heads"),
        )
    )
    return ()


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; which layers have experts shows in tensor names.

    Raises ``ArchitectureError`` for missing keys.
    """
    reader = shared.Reader(values, tensors)
    shape, experts = reader.shape(), reader.experts()
    attention = reader.attention(mixer="mamba1")
    length = reader.count("feed_forward_length")
    layers = tuple(
        layer._replace(feed_forward=("moe",)) if f"blk.{i}.ffn_gate_inp.weight" in tensors else layer
        for i, layer in enumerate(attention.pop("layers"))
    )
    mixture = any("moe" in layer.feed_forward for layer in layers)
    return Config(
        **shape,
        **attention,
        **reader.mamba1(),
        layers=layers,
        intermediate_size=length,
        mixer_rms_eps=shape["rms_norm_eps"],
        mixer_norm_weights=True,
        num_local_experts=experts if mixture else 0,
        num_experts_per_tok=reader.count("expert_used_count", most=experts) if mixture else 0,
        expert_intermediate_size=length if mixture else 0,
        norm_topk_prob=False,
    )
