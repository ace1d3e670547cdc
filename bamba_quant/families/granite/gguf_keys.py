"""The GGUF keys of Granite 4.0: llama.cpp's src/models/granite-hybrid.cpp, granite.cpp and granite-moe.cpp."""

from __future__ import annotations

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import KeyValues, array, boolean, float32, uint32
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.granite.rules import has_experts
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config

HYBRID, DENSE, EXPERTS = "granitehybrid", "granite", "granitemoe"


def gguf_architecture(config: Config) -> str:
    if config.mamba_layers:
        return HYBRID
    return EXPERTS if has_experts(config) else DENSE


def write(config: Config) -> Metadata:
    """What llama.cpp reads (``load_arch_hparams`` of the three; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if "attention" in layer.blocks else 0 for layer in config.layers]
    written = {
        **shared.shape(config),
        "embedding_scale": float32(config.embedding_multiplier),
        "residual_scale": float32(config.residual_multiplier),
        "logit_scale": float32(config.logits_scaling),
        **shared.attention(config),
        "attention.scale": float32(config.attention_scale),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        # The rows of a head even where none is rotated: granite.cpp asserts it.
        "rope.dimension_count": uint32(config.head_dim),
        # llama.cpp reads this key as the switch of the rotary embedding.
        "rope.scaling.finetuned": boolean(config.rotary_dim > 0),
        "feed_forward_length": uint32(config.intermediate_size),
    }
    if has_experts(config):
        written |= {
            "feed_forward_length": uint32(config.expert_intermediate_size),
            "expert_shared_feed_forward_length": uint32(config.intermediate_size),
            "expert_count": uint32(config.num_local_experts),
            "expert_used_count": uint32(config.num_experts_per_tok),
        }
    # llama.cpp's converter writes these where no layer needs them, too.
    return written | shared.mamba2(config)


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graphs cannot represent."""
    multipliers = {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": config.logits_scaling,
    }
    mixer = (limitations.expansion(config), *limitations.mixer(config)) if config.mamba_layers else ()
    limitations.check(
        (
            *mixer,
            *limitations.common(config),
            *(
                (key, value, value != 0, "another number (0 means no multiplier)")
                for key, value in multipliers.items()
            ),
            (
                "layer_types",
                "attention in no layer",
                bool(config.attention_layers),
                "at least one attention layer",
            ),
            # granite-moe.cpp does not read the switch of the rotary embedding.
            (
                "position_embedding_type",
                "nope, with experts and attention in every layer",
                config.rotary_dim > 0 or gguf_architecture(config) != EXPERTS,
                "rope",
            ),
        )
    )
    return ()


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    reader = shared.Reader(values, tensors)
    experts = reader.experts()
    attention = reader.attention(("moe", "mlp") if experts else ("mlp",))
    length = reader.count("feed_forward_length")
    return Config(
        **reader.shape(),
        **attention,
        **reader.mamba2(),
        intermediate_size=reader.count("expert_shared_feed_forward_length") if experts else length,
        rotary_dim=reader.rotary_dim(attention["head_dim"])
        if reader.flag("rope.scaling.finetuned", True)
        else 0,
        embedding_multiplier=reader.scale("embedding_scale") or 1.0,
        residual_multiplier=reader.scale("residual_scale") or 1.0,
        attention_multiplier=reader.scale("attention.scale"),
        logits_scaling=reader.scale("logit_scale") or 1.0,
        num_local_experts=experts,
        num_experts_per_tok=reader.count("expert_used_count", most=experts) if experts else 0,
        expert_intermediate_size=length if experts else 0,
    )
