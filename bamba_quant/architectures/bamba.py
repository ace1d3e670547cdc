"""Bamba (Mamba-2 and attention layers with a partial rotary embedding), which llama.cpp runs as ``granitehybrid``.

Sources: transformers' modeling_bamba.py for the left-hand names; llama.cpp's src/models/granite-hybrid.cpp and
gguf-py's tensor_mapping.py for the right-hand ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from gguf import GGUFValueType

from bamba_quant.architectures.rules import Architecture, Metadata, Rule, register
from bamba_quant.architectures.transforms import NEGATIVE_EXP, Transform, interleave_rotary
from bamba_quant.checkpoint.gguf_values import Value, array, boolean, float32, uint32
from bamba_quant.errors import ArchitectureError
from bamba_reference.config import Config

_L = "model.layers.{i}."
_B = "blk.{i}."


def _mamba(config: Config) -> tuple[int, ...]:
    return config.mamba_layers


def _attention(config: Config) -> tuple[int, ...]:
    return config.attention_layers


def _attention_bias(config: Config) -> bool:
    return config.attention_bias


def _mlp_bias(config: Config) -> bool:
    return config.mlp_bias


def _hidden(config: Config) -> tuple[int]:
    return (config.hidden_size,)


def _embedding(config: Config) -> tuple[int, int]:
    return (config.vocab_size, config.hidden_size)


def _heads(config: Config) -> tuple[int]:
    return (config.mamba_n_heads,)


def _heads_by_one(config: Config) -> tuple[int, int]:
    return (config.mamba_n_heads, 1)


def _query(config: Config) -> tuple[int, int]:
    return (config.num_attention_heads * config.head_dim, config.hidden_size)


def _key_value(config: Config) -> tuple[int, int]:
    return (config.num_key_value_heads * config.head_dim, config.hidden_size)


def _up(config: Config) -> tuple[int, int]:
    return (config.intermediate_size, config.hidden_size)


def _rotary(config: Config) -> Transform:
    return interleave_rotary(config.head_dim, config.rotary_dim)


# fmt: off
RULES = (
    Rule("model.embed_tokens.weight", "token_embd.weight", "token_embd", _embedding),
    Rule("lm_head.weight", "output.weight", "output", _embedding, when=lambda c: not c.tie_word_embeddings),
    Rule("lm_head.weight", None, "output", _embedding, when=lambda c: c.tie_word_embeddings,
         left_out="tied to the embedding", equal_to="model.embed_tokens.weight"),
    Rule("model.final_layernorm.weight", "output_norm.weight", "norm", _hidden),
    Rule(_L + "input_layernorm.weight", _B + "attn_norm.weight", "norm", _hidden),
    # Rows of in_proj, in order: z, x, B, C, dt.
    Rule(_L + "mamba.in_proj.weight", _B + "ssm_in.weight", "ssm_in",
         lambda c: (c.mamba_in_proj_dim, c.hidden_size), layers=_mamba),
    Rule(_L + "mamba.conv1d.weight", _B + "ssm_conv1d.weight", "ssm_conv1d",
         lambda c: (c.mamba_conv_dim, 1, c.mamba_d_conv),
         gguf_shape=lambda c: (c.mamba_conv_dim, c.mamba_d_conv), layers=_mamba),
    Rule(_L + "mamba.conv1d.bias", _B + "ssm_conv1d.bias", "bias", lambda c: (c.mamba_conv_dim,),
         layers=_mamba, when=lambda c: c.mamba_conv_bias),
    Rule(_L + "mamba.dt_bias", _B + "ssm_dt.bias", "ssm_dt", _heads, layers=_mamba),
    Rule(_L + "mamba.A_log", _B + "ssm_a", "ssm_a", _heads, gguf_shape=_heads_by_one,
         transform=lambda c: NEGATIVE_EXP, layers=_mamba),
    Rule(_L + "mamba.D", _B + "ssm_d", "ssm_d", _heads, gguf_shape=_heads_by_one, layers=_mamba),
    Rule(_L + "mamba.norm.weight", _B + "ssm_norm.weight", "norm", lambda c: (c.mamba_d_inner,),
         gguf_shape=lambda c: (c.mamba_n_groups, c.mamba_d_inner // c.mamba_n_groups), layers=_mamba),
    Rule(_L + "mamba.out_proj.weight", _B + "ssm_out.weight", "ssm_out",
         lambda c: (c.hidden_size, c.mamba_d_inner), layers=_mamba),
    Rule(_L + "self_attn.q_proj.weight", _B + "attn_q.weight", "attn_q", _query, transform=_rotary,
         layers=_attention),
    Rule(_L + "self_attn.k_proj.weight", _B + "attn_k.weight", "attn_k", _key_value, transform=_rotary,
         layers=_attention),
    Rule(_L + "self_attn.v_proj.weight", _B + "attn_v.weight", "attn_v", _key_value, layers=_attention),
    Rule(_L + "self_attn.o_proj.weight", _B + "attn_output.weight", "attn_output",
         lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim), layers=_attention),
    Rule(_L + "self_attn.q_proj.bias", _B + "attn_q.bias", "bias", lambda c: _query(c)[:1], transform=_rotary,
         layers=_attention, when=_attention_bias),
    Rule(_L + "self_attn.k_proj.bias", _B + "attn_k.bias", "bias", lambda c: _key_value(c)[:1], transform=_rotary,
         layers=_attention, when=_attention_bias),
    Rule(_L + "self_attn.v_proj.bias", _B + "attn_v.bias", "bias", lambda c: _key_value(c)[:1],
         layers=_attention, when=_attention_bias),
    Rule(_L + "self_attn.o_proj.bias", _B + "attn_output.bias", "bias", _hidden, layers=_attention,
         when=_attention_bias),
    Rule(_L + "self_attn.rotary_emb.inv_freq", None, "rotary", lambda c: (c.rotary_dim // 2,), layers=_attention,
         left_out="recomputed from rope_theta"),
    Rule(_L + "pre_ff_layernorm.weight", _B + "ffn_norm.weight", "norm", _hidden),
    Rule(_L + "feed_forward.gate_proj.weight", _B + "ffn_gate.weight", "ffn_gate", _up),
    Rule(_L + "feed_forward.up_proj.weight", _B + "ffn_up.weight", "ffn_up", _up),
    Rule(_L + "feed_forward.down_proj.weight", _B + "ffn_down.weight", "ffn_down",
         lambda c: (c.hidden_size, c.intermediate_size)),
    Rule(_L + "feed_forward.gate_proj.bias", _B + "ffn_gate.bias", "bias", lambda c: (c.intermediate_size,),
         when=_mlp_bias),
    Rule(_L + "feed_forward.up_proj.bias", _B + "ffn_up.bias", "bias", lambda c: (c.intermediate_size,),
         when=_mlp_bias),
    Rule(_L + "feed_forward.down_proj.bias", _B + "ffn_down.bias", "bias", _hidden, when=_mlp_bias),
)
# fmt: on


# Multipliers and experts, which make a granitehybrid file a Granite.
_GRANITE_KEYS = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale", "expert_count")


def _gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp reads for ``granitehybrid`` (granite-hybrid.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    kv_heads = [config.num_key_value_heads if kind == "attention" else 0 for kind in config.layer_types]
    return {
        "block_count": uint32(config.num_hidden_layers),
        "context_length": uint32(config.max_position_embeddings),
        "embedding_length": uint32(config.hidden_size),
        "feed_forward_length": uint32(config.intermediate_size),
        "vocab_size": uint32(config.vocab_size),
        "attention.head_count": uint32(config.num_attention_heads),
        # A layer is recurrent where it has no key-value heads.
        "attention.head_count_kv": array(GGUFValueType.INT32, kv_heads),
        "attention.key_length": uint32(config.head_dim),
        "attention.value_length": uint32(config.head_dim),
        "attention.layer_norm_rms_epsilon": float32(config.rms_norm_eps),
        "rope.dimension_count": uint32(config.rotary_dim),
        "rope.freq_base": float32(config.rope_theta),
        # llama.cpp reads this key as the switch of the rotary embedding.
        "rope.scaling.finetuned": boolean(True),
        "ssm.conv_kernel": uint32(config.mamba_d_conv),
        "ssm.inner_size": uint32(config.mamba_d_inner),
        "ssm.state_size": uint32(config.mamba_d_state),
        # For Mamba-2 llama.cpp reads the number of heads under this name.
        "ssm.time_step_rank": uint32(config.mamba_n_heads),
        "ssm.group_count": uint32(config.mamba_n_groups),
    }


_LLAMA_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp's src/llama-hparams.h


def _check_gguf(config: Config) -> None:
    """What llama.cpp's graph for ``granitehybrid`` has no place for. Raises ``ArchitectureError``."""
    low, high = config.time_step_limit
    refusals = (
        ("mamba_expand", config.mamba_expand, config.mamba_expand == 2, "2"),
        (
            "mamba_conv_bias",
            config.mamba_conv_bias,
            config.mamba_conv_bias,
            "true (its graph adds the bias unasked)",
        ),
        (
            "num_hidden_layers",
            config.num_hidden_layers,
            config.num_hidden_layers <= _LLAMA_MAX_LAYERS,
            f"at most {_LLAMA_MAX_LAYERS}",
        ),
        ("mamba_proj_bias", config.mamba_proj_bias, not config.mamba_proj_bias, "false"),
        ("time_step_limit", [low, high], low <= 0 and math.isinf(high), "[0, Infinity]: no limit"),
        ("hidden_act", config.hidden_act, config.hidden_act == "silu", "silu"),
        (
            "attn_layer_indices",
            list(config.attention_layers),
            bool(config.attention_layers),
            "at least one attention layer (a model without any is a Mamba-2 model)",
        ),
        ("layer_types", "attention in every layer", bool(config.mamba_layers), "at least one Mamba layer"),
    )
    for key, value, supported, expected in refusals:
        if not supported:
            raise ArchitectureError(
                f"llama.cpp cannot represent this model's {key}",
                where="config.json",
                found=f"{key} = {value}",
                expected=expected,
                fix="GGUF is no way out for this model; the reference forward pass still runs it",
            )


def _config_of_gguf(values: Mapping[str, Value], tensors: Collection[str]) -> Config:
    """``_gguf_metadata`` read back; biases and tying show in the tensors' names.

    Raises ``ArchitectureError`` for keys that are missing, or that make the file another ``granitehybrid`` model.
    """

    def read(key: str, default: Any = None) -> Any:
        found = values.get(f"granitehybrid.{key}")
        if found is None and default is None:
            raise ArchitectureError(
                "the file lacks a key-value its architecture needs", found=f"no granitehybrid.{key}"
            )
        return default if found is None else found.value

    for key in _GRANITE_KEYS:
        if read(key, 0):
            raise ArchitectureError(
                "this granitehybrid file is no Bamba",
                found=f"granitehybrid.{key} = {read(key)}",
                expected="Bamba",
            )
    special = {
        kind: values[f"tokenizer.ggml.{kind}_token_id"].value
        if f"tokenizer.ggml.{kind}_token_id" in values
        else None
        for kind in ("bos", "eos", "padding")
    }
    heads, hidden_size = int(read("attention.head_count")), int(read("embedding_length"))
    head_dim = int(read("attention.key_length", hidden_size // heads))
    kv_heads = read("attention.head_count_kv")
    n_heads, d_inner = int(read("ssm.time_step_rank")), int(read("ssm.inner_size"))
    return Config(
        vocab_size=int(read("vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(read("feed_forward_length")),
        layer_types=tuple("attention" if count else "mamba" for count in kv_heads),
        num_attention_heads=heads,
        num_key_value_heads=max(kv_heads),
        head_dim=head_dim,
        rotary_dim=int(read("rope.dimension_count", head_dim)),
        rope_theta=float(read("rope.freq_base", 10000.0)),
        attention_bias=any(name.endswith("attn_q.bias") for name in tensors),
        mlp_bias=any(name.endswith("ffn_up.bias") for name in tensors),
        hidden_act="silu",
        mamba_expand=d_inner // hidden_size,
        mamba_n_heads=n_heads,
        mamba_d_head=d_inner // n_heads,
        mamba_n_groups=int(read("ssm.group_count")),
        mamba_d_state=int(read("ssm.state_size")),
        mamba_d_conv=int(read("ssm.conv_kernel")),
        mamba_conv_bias=any(name.endswith("ssm_conv1d.bias") for name in tensors),
        mamba_proj_bias=False,
        time_step_limit=(0.0, math.inf),
        rms_norm_eps=float(read("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in tensors,
        max_position_embeddings=int(read("context_length")),
        bos_token_id=special["bos"],
        eos_token_ids=(special["eos"],) if special["eos"] is not None else (),
        pad_token_id=special["padding"],
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
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attn_layer_indices": list(config.attention_layers),
        "attn_rotary_emb": config.rotary_dim,
        "rope_theta": _shortest(config.rope_theta),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        "mamba_expand": config.mamba_expand,
        "mamba_n_heads": config.mamba_n_heads,
        "mamba_d_head": config.mamba_d_head,
        "mamba_n_groups": config.mamba_n_groups,
        "mamba_d_state": config.mamba_d_state,
        "mamba_d_conv": config.mamba_d_conv,
        "mamba_conv_bias": config.mamba_conv_bias,
        "mamba_proj_bias": config.mamba_proj_bias,
        "rms_norm_eps": _shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        # Written even where there is none: transformers' defaults are 1, 2 and 0.
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0]
        if len(config.eos_token_ids) == 1
        else list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.head_dim
    if 2 * config.rotary_dim != config.head_dim:
        # transformers rotates half of each head unless this says otherwise, and cuts the product down to an integer.
        factor = config.rotary_dim / config.head_dim
        if int(config.head_dim * factor) < config.rotary_dim:
            factor = math.nextafter(factor, 1)
        written["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": _shortest(config.rope_theta),
            "partial_rotary_factor": factor,
        }
    low, high = config.time_step_limit
    if (low, high) != (0.0, math.inf):
        written["time_step_limit"] = [low, high]
    return written


def _shortest(number: float) -> float:
    """The shortest decimal among those a file's float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


BAMBA = register(
    Architecture(
        name="bamba",
        hf_architectures=("BambaForCausalLM",),
        gguf_architecture="granitehybrid",
        rules=RULES,
        gguf_metadata=_gguf_metadata,
        check_gguf=_check_gguf,
        config_of_gguf=_config_of_gguf,
        hf_config=_hf_config,
    )
)
