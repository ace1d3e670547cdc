"""The GGUF keys of Nemotron-H: llama.cpp's src/models/nemotron-h.cpp."""

from __future__ import annotations

from typing import Any

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import KeyValues, array, boolean, float32, uint32
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config, Layer

DENSE, EXPERTS = "nemotron_h", "nemotron_h_moe"


def gguf_architecture(config: Config) -> str:
    return EXPERTS if config.num_local_experts else DENSE


def write(config: Config) -> Metadata:
    """What llama.cpp reads (``load_arch_hparams``; llama-model.cpp)."""
    width = config.expert_intermediate_size or config.intermediate_size
    # A layer is attention where it has key-value heads, a network where it has a width, and else recurrent.
    kv_heads = [config.num_key_value_heads if "attention" in layer.blocks else 0 for layer in config.layers]
    widths = [width if "mlp" in layer.blocks else 0 for layer in config.layers]
    written = {
        **shared.shape(config),
        **shared.attention(config),
        # Required, and not used but where further tokens are predicted.
        "attention.layer_norm_epsilon": float32(config.rms_norm_eps),
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        "feed_forward_length": array(GGUFValueType.INT32, widths),
        **shared.mamba2(config),
    }
    if config.num_local_experts:
        written |= {
            "expert_count": uint32(config.num_local_experts),
            "expert_used_count": uint32(config.num_experts_per_tok),
            "expert_feed_forward_length": uint32(config.expert_intermediate_size),
            "expert_shared_feed_forward_length": uint32(config.intermediate_size),
            "expert_shared_count": uint32(1),
            "expert_weights_norm": boolean(config.norm_topk_prob),
            "expert_weights_scale": float32(config.expert_weights_scale),
            "expert_group_count": uint32(config.expert_groups),
            "expert_group_used_count": uint32(config.used_expert_groups),
        }
    return written | ({"moe_latent_size": uint32(config.moe_latent_size)} if config.moe_latent_size else {})


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph cannot represent."""
    kinds = set(config.layers)
    limitations.check(
        (
            *limitations.mixer(config),
            *limitations.common(config, "relu2"),
            (
                "mlp_bias",
                config.mlp_bias,
                not (config.mlp_bias and config.num_local_experts),
                "false, in a model with experts",
            ),
            (
                "layers_block_type",
                "networks with experts and without",
                not {Layer(("mlp",)), Layer(("moe", "mlp"))} <= kinds,
                "one kind of them",
            ),
            (
                "layers_block_type",
                "no attention or no Mamba-2 layer",
                {Layer(("mamba2",)), Layer(("attention",))} <= kinds,
                "at least one of each",
            ),
        )
    )
    return ()


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    reader = shared.Reader(values, tensors)
    experts = reader.experts()
    attention = reader.attention(())
    widths = reader.per_layer("feed_forward_length")
    network = Layer(("moe", "mlp") if experts else ("mlp",))
    layers = tuple(
        network if width else layer for layer, width in zip(attention["layers"], widths, strict=True)
    )
    mixture: dict[str, Any] = {}
    if experts:
        groups = reader.count("expert_group_count", 1, most=max(1, experts // 2))
        size = reader.quotient("expert_group_count", experts, groups, "expert_count")
        used = reader.count("expert_group_used_count", 1, most=groups)
        mixture = {
            "num_local_experts": experts,
            "num_experts_per_tok": reader.count("expert_used_count", most=used * size),
            "expert_intermediate_size": reader.count("expert_feed_forward_length"),
            "expert_scores": "sigmoid",
            "norm_topk_prob": reader.flag("expert_weights_norm", False),
            "expert_weights_scale": reader.positive("expert_weights_scale", 1.0)
            if reader.scale("expert_weights_scale")
            else 1.0,
            "expert_groups": groups,
            "used_expert_groups": used,
            "moe_latent_size": reader.count("moe_latent_size", 0),
        }
    width = reader.count("expert_shared_feed_forward_length") if experts else max(widths)
    return Config(
        **reader.shape(),
        **{**attention, "layers": layers},
        **reader.mamba2(expands=False),
        intermediate_size=width,
        mlp_bias=reader.has_bias("ffn_up"),
        hidden_act="relu2",
        **mixture,
    )
