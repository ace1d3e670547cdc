"""Bamba (Mamba-2 and attention layers with a partial rotary embedding), which llama.cpp runs as ``granitehybrid``.

Sources: transformers' modeling_bamba.py for the left-hand names; llama.cpp's src/models/granite-hybrid.cpp and
gguf-py's tensor_mapping.py for the right-hand ones.
"""

from __future__ import annotations

import math
from typing import Any

from gguf import GGUFValueType

from bamba_quant.checkpoint.gguf_values import array, boolean, uint32
from bamba_quant.families import keys
from bamba_quant.families import limitations as refusals
from bamba_quant.families.gguf_reader import Reader
from bamba_quant.families.rows import ATTENTION, EMBEDDINGS, FEED_FORWARD, MAMBA2
from bamba_quant.families.rules import Architecture, Metadata, Tensors, Values, register
from bamba_quant.families.runtime_compat import (
    ATTENTION_INPUTS,
    MERGED_ATTENTION,
    MERGED_FEED_FORWARD,
    MERGED_MIXER,
    Loaders,
)
from bamba_reference.config import Config


def _gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp reads for ``granitehybrid`` (granite-hybrid.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in config.layer_types]
    return {
        **keys.shape(config),
        "feed_forward_length": uint32(config.intermediate_size),
        **keys.attention(config),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        "rope.dimension_count": uint32(config.rotary_dim),
        # llama.cpp reads this key as the switch of the rotary embedding.
        "rope.scaling.finetuned": boolean(True),
        **keys.mamba2(config),
    }


def _check_gguf(config: Config) -> tuple[str, ...]:
    """What llama.cpp's graph for ``granitehybrid`` has no place for. Raises ``ArchitectureError``."""
    refusals.refuse(
        (
            refusals.expansion(config),
            *refusals.mixer(config),
            *refusals.common(config),
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


def _config_of_gguf(values: Values, tensors: Tensors) -> Config:
    """``_gguf_metadata`` read back; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    read = Reader(values, tensors)
    attention = read.attention()
    return Config(
        **read.shape(),
        intermediate_size=read.count("feed_forward_length"),
        **attention,
        rotary_dim=read.rotary_dim(attention["head_dim"]),
        mlp_bias=read.has_bias("ffn_up"),
        hidden_act="silu",
        **read.mamba2(),
    )


def _hf_config(config: Config) -> dict[str, Any]:
    """config.json in the keys of both transformers 4 (configuration_bamba.py: ``attn_rotary_emb``) and 5."""
    written: dict[str, Any] = {
        "architectures": ["BambaForCausalLM"],
        "model_type": "bamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "attn_layer_indices": list(config.attention_layers),
        "attn_rotary_emb": config.rotary_dim,
        **keys.hf_attention(config),
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        **keys.hf_mamba2(config),
        "rms_norm_eps": keys.shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **keys.hf_special_tokens(config),
        "use_cache": True,
    }
    if 2 * config.rotary_dim != config.head_dim:
        # transformers rotates half of each head unless this says otherwise, and cuts the product down to an integer.
        factor = config.rotary_dim / config.head_dim
        if int(config.head_dim * factor) < config.rotary_dim:
            factor = math.nextafter(factor, 1)
        written["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": keys.shortest(config.rope_theta),
            "partial_rotary_factor": factor,
        }
    return written


# vLLM's class counts down_proj, wrongly, among what gate_up_proj consists of (bamba.py, packed_modules_mapping).
_LOADERS = Loaders(
    vllm={".mamba.": ".mixer.", ".self_attn.": "."},
    units=(ATTENTION_INPUTS, frozenset({"ffn_gate", "ffn_up", "ffn_down"})),
    merged=(MERGED_ATTENTION, MERGED_MIXER, *MERGED_FEED_FORWARD),
)

BAMBA = register(
    Architecture(
        name="bamba",
        hf_architectures=("BambaForCausalLM",),
        gguf_architectures=("granitehybrid",),
        rules=EMBEDDINGS + MAMBA2 + ATTENTION + FEED_FORWARD,
        gguf_metadata=_gguf_metadata,
        check_gguf=_check_gguf,
        config_of_gguf=_config_of_gguf,
        hf_config=_hf_config,
        reads_gguf=lambda values: not keys.is_granite(values),
        loaders=_LOADERS,
    )
)
