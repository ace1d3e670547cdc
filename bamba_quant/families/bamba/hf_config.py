"""Reads Bamba's configurations (``BambaForCausalLM``); defaults are those of transformers' ``BambaConfig``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from bamba_quant.families import hf_reading as reading
from bamba_quant.families import hf_writing as writing
from bamba_reference.config import Block, Config, single_block_layers
from bamba_reference.errors import ConfigError, repr_short

KEYS = frozenset(
    """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    attn_layer_indices attn_layer_period attn_layer_offset layer_types layers_block_type attn_rotary_emb
    partial_rotary_factor rope_theta rope_parameters rope_scaling attention_bias mlp_bias hidden_act mamba_expand
    mamba_n_heads mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv mamba_conv_bias mamba_proj_bias
    time_step_limit rms_norm_eps tie_word_embeddings max_position_embeddings sliding_window
    """.split()
)

# Told to what the model was made with, and of no consequence afterwards.
INERT = frozenset({"pad_vocab_size_multiple"})


def read(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    reading.refuse_unknown_keys(hf, KEYS | INERT, ignore, "transformers' BambaConfig")
    if hf.get("sliding_window") is not None:
        raise reading.unsupported("sliding_window", hf["sliding_window"], "null (full attention)")
    blocks = _blocks(hf)
    hidden_size = reading.integer(hf, "hidden_size")
    heads = reading.integer(hf, "num_attention_heads")
    kv_heads = reading.integer(hf, "num_key_value_heads", default=heads)
    head_dim = reading.head_dim(hf, hidden_size, heads)
    expand = reading.integer(hf, "mamba_expand", default=2)
    mamba_heads = reading.integer(hf, "mamba_n_heads", default=128)
    d_head = reading.mamba2_head_dim(hf, expand, hidden_size, mamba_heads, "mamba_d_head")
    groups = reading.integer(hf, "mamba_n_groups", default=1)
    reading.quotient(mamba_heads, groups, "mamba_n_heads", "mamba_n_groups")
    reading.quotient(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    rope = reading.rope_sources(hf)
    return Config(
        vocab_size=reading.vocab_size(hf),
        hidden_size=hidden_size,
        intermediate_size=reading.integer(hf, "intermediate_size"),
        layers=single_block_layers(blocks, feed_forward=("mlp",)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(hf, rope, head_dim),
        rope_theta=reading.rope_theta(rope),
        attention_bias=reading.boolean(hf, "attention_bias", default=False),
        mlp_bias=reading.boolean(hf, "mlp_bias", default=False),
        hidden_act=reading.only_silu(hf),
        mamba_expand=expand,
        mamba_n_heads=mamba_heads,
        mamba_d_head=d_head,
        mamba_n_groups=groups,
        mamba_d_state=reading.integer(hf, "mamba_d_state", default=256),
        mamba_d_conv=reading.integer(hf, "mamba_d_conv", default=4),
        mamba_conv_bias=reading.boolean(hf, "mamba_conv_bias", default=True),
        mamba_proj_bias=reading.boolean(hf, "mamba_proj_bias", default=False),
        time_step_limit=reading.time_step_limit("time_step_limit", hf.get("time_step_limit")),
        rms_norm_eps=reading.positive("rms_norm_eps", hf.get("rms_norm_eps"), default=1e-5),
        tie_word_embeddings=reading.boolean(hf, "tie_word_embeddings", default=False),
        max_position_embeddings=reading.integer(hf, "max_position_embeddings", default=262144),
        bos_token_id=reading.token_id(hf, "bos_token_id"),
        eos_token_ids=reading.token_ids("eos_token_id", hf.get("eos_token_id")),
        pad_token_id=reading.token_id(hf, "pad_token_id"),
    )


def _blocks(hf: Mapping[str, Any]) -> tuple[Block, ...]:
    count = reading.integer(hf, "num_hidden_layers", most=reading.MOST_LAYERS)
    named = reading.layer_types_named(hf, count)
    for indices in (_attention_indices(hf, count), _periodic_indices(hf, count)):
        if indices is not None:
            kinds: list[Block] = ["attention" if i in indices else "mamba2" for i in range(count)]
            named.append(tuple(kinds))
    return reading.agreed(named, default=reading.alike("mamba2", count))


def _attention_indices(hf: Mapping[str, Any], count: int) -> Collection[int] | None:
    indices = hf.get("attn_layer_indices")
    if indices is None:
        return None
    if not isinstance(indices, list | tuple) or not all(map(reading.is_int, indices)):
        raise reading.unsupported("attn_layer_indices", indices, "a list of whole numbers")
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise ConfigError(
            "attn_layer_indices names layers that are not there",
            found=repr_short(outside),
            expected=f"0 to {count - 1} (num_hidden_layers is {count})",
        )
    return frozenset(indices)


def _periodic_indices(hf: Mapping[str, Any], count: int) -> Collection[int] | None:
    if hf.get("attn_layer_period") is None and hf.get("attn_layer_offset") is None:
        return None
    period = reading.integer(hf, "attn_layer_period")
    offset = reading.integer(hf, "attn_layer_offset", least=0, most=period - 1)
    return range(offset, count, period)


def _rotary_dim(hf: Mapping[str, Any], rope: list[tuple[str, Mapping[str, Any]]], head_dim: int) -> int:
    """Width of the rotary embedding; half of each head where nothing says otherwise (BambaConfig)."""
    widths: dict[str, int] = {}
    for prefix, source in rope:
        if source.get("partial_rotary_factor") is not None:
            key, found = f"{prefix}partial_rotary_factor", source["partial_rotary_factor"]
            factor = reading.positive(key, found)
            if factor > 1:
                raise reading.unsupported(key, found, "at most 1, which rotates the whole head")
            widths[f"{key} = {factor}"] = int(head_dim * factor)
    if hf.get("attn_rotary_emb") is not None:
        widths[f"attn_rotary_emb = {hf['attn_rotary_emb']}"] = reading.integer(hf, "attn_rotary_emb")
    if len(set(widths.values())) > 1:
        raise ConfigError(
            "the configuration gives the rotary width twice, differently",
            found="; ".join(f"{key} → {width} of {head_dim}" for key, width in widths.items()),
            expected="attn_rotary_emb = partial_rotary_factor × head size",
            fix="keep the one the model was trained with",
        )
    rotary_dim = next(iter(widths.values()), head_dim // 2)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise reading.unsupported(
            "attn_rotary_emb", rotary_dim, f"an even number from 2 to the head size, {head_dim}"
        )
    return rotary_dim


def write(config: Config) -> dict[str, Any]:
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
        **writing.attention(config),
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        **writing.mamba2(config),
        "rms_norm_eps": writing.shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **writing.special_tokens(config),
        "use_cache": True,
    }
    if 2 * config.rotary_dim != config.head_dim:
        # transformers rotates half of each head unless this says otherwise, and cuts the product down to an integer.
        factor = config.rotary_dim / config.head_dim
        if int(config.head_dim * factor) < config.rotary_dim:
            factor = math.nextafter(factor, 1)
        written["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": writing.shortest(config.rope_theta),
            "partial_rotary_factor": factor,
        }
    return written
