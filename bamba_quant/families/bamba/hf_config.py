"""Bamba's config.json; defaults are those of transformers' ``BambaConfig`` (configuration_bamba.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Block, Config, single_block_layers
from bamba_reference.errors import ConfigError, repr_short


def _indices(value: Any) -> tuple[int, ...]:
    schema.require(isinstance(value, list | tuple) and all(type(index) is int for index in value))
    return tuple(value)


def _rope_parameters(config: Config) -> Any:
    """Written where transformers would rotate another part of each head than half of it, its default."""
    if 2 * config.rotary_dim == config.head_dim:
        return schema.OMITTED
    factor = config.rotary_dim / config.head_dim
    if int(config.head_dim * factor) < config.rotary_dim:  # transformers rounds the product down
        factor = math.nextafter(factor, 1)
    return {
        "rope_type": "default",
        "rope_theta": schema.shortest(config.rope_theta),
        "partial_rotary_factor": factor,
    }


_KEYS = {
    "vocab_size": schema.count(most=schema.MOST_TOKENS),
    "hidden_size": schema.count(),
    "intermediate_size": schema.count(),
    "num_hidden_layers": schema.count(most=schema.MOST_LAYERS, write=lambda config: config.num_hidden_layers),
    "attn_layer_indices": schema.HfKey(
        _indices, "a list of whole numbers", write=lambda config: list(config.attention_layers)
    ),
    "attn_layer_period": schema.count(None),
    "attn_layer_offset": schema.count(None, least=0),
    **hf_keys.listed_layers(),
    "rotary_dim": schema.count(None, key="attn_rotary_emb"),
    **hf_keys.attention(),
    "sliding_window": schema.only(expected="null (full attention)"),
    "mlp_bias": schema.flag(False),
    "hidden_act": hf_keys.SILU,
    **hf_keys.MAMBA2,
    "rms_norm_eps": schema.positive(1e-5),
    "tie_word_embeddings": schema.flag(False),
    "max_position_embeddings": schema.count(262144),
    **hf_keys.SPECIAL_TOKENS,
    **hf_keys.USE_CACHE,
    **hf_keys.rope_keys(write=_rope_parameters),
}


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    attention = hf_keys.complete_attention(values)
    theta, factors = hf_keys.rope(values)
    layers = values["num_hidden_layers"]
    listed = []
    for indices in (_attention_indices(values, layers), _periodic_indices(values, layers)):
        if indices is not None:
            kinds: list[Block] = ["attention" if i in indices else "mamba2" for i in range(layers)]
            listed.append(tuple(kinds))
    return {
        "layers": single_block_layers(hf_keys.blocks(values, *listed), feed_forward=("mlp",)),
        **attention,
        **hf_keys.complete_mamba2(values, _KEYS),
        "rope_theta": theta,
        "rotary_dim": _rotary_dim(values["rotary_dim"], factors, attention["head_dim"]),
    }


def _attention_indices(values: Mapping[str, Any], layers: int) -> frozenset[int] | None:
    indices = values["attn_layer_indices"]
    if indices is None:
        return None
    outside = [i for i in indices if not 0 <= i < layers]
    if outside:
        raise ConfigError(
            "attn_layer_indices names layers that do not exist",
            found=repr_short(outside),
            expected=f"0 to {layers - 1} (num_hidden_layers is {layers})",
        )
    return frozenset(indices)


def _periodic_indices(values: Mapping[str, Any], layers: int) -> range | None:
    period, offset = values["attn_layer_period"], values["attn_layer_offset"]
    if period is None and offset is None:
        return None
    for key in ("attn_layer_period", "attn_layer_offset"):
        if values[key] is None:
            raise ConfigError(f"the configuration lacks {key}", expected="both of the period and the offset")
    if offset >= period:
        raise schema.unsupported("attn_layer_offset", offset, f"a whole number from 0 to {period - 1}")
    return range(offset, layers, period)


def _rotary_dim(width: int | None, factors: Mapping[str, float], head_dim: int) -> int:
    """Width of the rotary embedding; half of each head where nothing says otherwise (BambaConfig)."""
    widths = {f"{key} = {factor}": int(head_dim * factor) for key, factor in factors.items()}
    for key, factor in factors.items():
        if factor > 1:
            raise schema.unsupported(key, factor, "at most 1, which rotates the whole head")
    if width is not None:
        widths[f"attn_rotary_emb = {width}"] = width
    if len(set(widths.values())) > 1:
        raise ConfigError(
            "the keys of config.json give different rotary widths",
            found="; ".join(f"{key} → {found} of {head_dim}" for key, found in widths.items()),
            expected="one width",
            fix="keep the one the model was trained with",
        )
    rotary_dim = next(iter(widths.values()), head_dim // 2)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise schema.unsupported(
            "attn_rotary_emb", rotary_dim, f"an even number from 2 to the head size, {head_dim}"
        )
    return rotary_dim


SCHEMA = schema.HfSchema(
    "transformers' BambaConfig", _KEYS, _complete, inert=frozenset({"pad_vocab_size_multiple"})
)
