"""Keys of config.json that several families share, and what follows from several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Block, Config
from bamba_reference.errors import ConfigError, repr_short

NO_POSITIONS = 2**20  # positions of a model that has none: llama.cpp's converter writes this context too

# transformers 5 writes the last two for what Granite and older files call the first two.
LAYER_TYPES: Mapping[str, Block] = {
    "mamba": "mamba2",
    "attention": "attention",
    "linear_attention": "mamba2",
    "full_attention": "attention",
}


def _one_token(value: Any) -> int | None:
    schema.require(not isinstance(value, list | tuple))
    return next(iter(schema.token_ids(value)), None)


def _eos(config: Config) -> Any:
    ids = config.eos_token_ids
    return ids[0] if len(ids) == 1 else list(ids) or None


def _limit(config: Config) -> Any:
    return schema.OMITTED if config.time_step_limit == (0.0, math.inf) else list(config.time_step_limit)


def _head_dim(config: Config) -> Any:
    divides = config.head_dim * config.num_attention_heads == config.hidden_size
    return schema.OMITTED if divides else config.head_dim


# null is written where there is none: transformers' defaults are other ids.
SPECIAL_TOKENS = {
    "bos_token_id": schema.HfKey(_one_token, "one token id, or null"),
    "eos_token_ids": schema.HfKey(
        schema.token_ids, "a token id, a list of them, or null", (), key="eos_token_id", write=_eos
    ),
    "pad_token_id": schema.HfKey(_one_token, "one token id, or null"),
}
USE_CACHE = {"use_cache": schema.HfKey(lambda value: value, "", write=lambda config: True)}
SILU = schema.only("silu", "swish", expected="silu")
TIME_STEP_LIMIT = schema.HfKey(
    schema.time_step_limit, "two numbers, the second of which may be Infinity", (0.0, math.inf), write=_limit
)


def attention(default_heads: Any = schema.REQUIRED) -> dict[str, schema.HfKey]:
    """Attention layers in the keys of Bamba and Granite; ``complete_attention`` fills in what follows."""
    return {
        "num_attention_heads": schema.count(default_heads),
        "num_key_value_heads": schema.count(None),
        "attention_bias": schema.flag(False),
        "rope_theta": schema.positive(None),
        "head_dim": schema.count(None, most=schema.MOST_HEAD_DIM, write=_head_dim),
    }


# Mamba-2 layers in the keys of Bamba and Granite; ``complete_mamba2`` fills in what follows.
MAMBA2 = {
    "mamba_expand": schema.count(2),
    "mamba_n_heads": schema.count(128),
    "mamba_d_head": schema.count_or_auto(),
    "mamba_n_groups": schema.count(1),
    "mamba_d_state": schema.count(256),
    "mamba_d_conv": schema.count(4),
    "mamba_conv_bias": schema.flag(True),
    "mamba_proj_bias": schema.flag(False),
    "time_step_limit": TIME_STEP_LIMIT,
}


def _parse_rope(value: Any) -> Mapping[str, Any]:
    schema.require(isinstance(value, Mapping))
    return dict(value)


def _parse_layers(value: Any) -> tuple[Block, ...]:
    schema.require(isinstance(value, list | tuple))
    schema.require(all(isinstance(name, str) and name in LAYER_TYPES for name in value))
    return tuple(LAYER_TYPES[name] for name in value)


def rope_keys(write: Callable[[Config], Any] | None = None) -> dict[str, schema.HfKey]:
    """Where the rotary embedding may be configured; ``write`` gives ``rope_parameters``."""
    return {
        "partial_rotary_factor": schema.positive(None),
        "rope_scaling": schema.HfKey(_parse_rope, "an object or null"),
        "rope_parameters": schema.HfKey(_parse_rope, "an object or null", write=write),
    }


def listed_layers(write: Callable[[Config], Any] | None = None) -> dict[str, schema.HfKey]:
    """Lists that name each layer; ``write`` gives ``layer_types``."""
    expected = f"a list that names each layer: {', '.join(LAYER_TYPES)}"
    return {
        "layer_types": schema.HfKey(_parse_layers, expected, write=write),
        "layers_block_type": schema.HfKey(_parse_layers, expected),
    }


def blocks(values: Mapping[str, Any], *others: tuple[Block, ...]) -> tuple[Block, ...]:
    """The first step of each layer, from the lists of names and from ``others``; Mamba-2 where nothing is said.

    Raises ``ConfigError`` where they differ.
    """
    layers, listed = values["num_hidden_layers"], list(others)
    for key in listed_layers():
        if values[key] is not None:
            if len(values[key]) != layers:
                raise ConfigError(f"{key} does not name every layer", found=len(values[key]), expected=layers)
            listed.append(values[key])
    if any(other != listed[0] for other in listed[1:]):
        raise ConfigError(
            "two keys of the configuration disagree about which layers are attention",
            found="; ".join(
                repr_short([i for i, kind in enumerate(each) if kind == "attention"]) for each in listed
            ),
            expected="layer_types, layers_block_type, attn_layer_indices and attn_layer_period to say the same",
        )
    return listed[0] if listed else ("mamba2",) * layers


def rope(values: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """The base of the rotary embedding, 10000 by default, and its partial factors by the keys that give them.

    The keys may stand at the top, in ``rope_scaling`` and in ``rope_parameters``. Raises ``ConfigError`` for a
    scaling and for values that differ.
    """
    top = {"rope_theta": values["rope_theta"], "partial_rotary_factor": values["partial_rotary_factor"]}
    found: dict[str, dict[str, float]] = {"rope_theta": {}, "partial_rotary_factor": {}}
    for outer in ("", "rope_scaling", "rope_parameters"):
        nested = top if not outer else values[outer] or {}
        for key, value in nested.items():
            name = f"{outer}.{key}" if outer else key
            if key in ("rope_type", "type"):
                if nested.get("rope_type", nested.get("type")) != "default":
                    raise schema.unsupported(f"{outer}.rope_type", value, "default (no scaling)")
            elif key not in found:
                raise schema.unsupported(name, value, "rope_theta and partial_rotary_factor only")
            elif value is not None:
                number = schema.positive(None)
                found[key][name] = schema.parsed(number.parse, name, value, number.expected)
    thetas = set(found["rope_theta"].values())
    if len(thetas) > 1:
        raise ConfigError(
            "rope_theta is given twice, with different values",
            found=sorted(thetas),
            expected="one value, at the top or in rope_parameters",
        )
    return next(iter(thetas), 10000.0), found["partial_rotary_factor"]


def complete_attention(values: Mapping[str, Any]) -> dict[str, int]:
    """Key-value heads, as many as heads by default, and the size of heads, by default the width's share of each."""
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads, head_dim = values["num_key_value_heads"] or heads, values["head_dim"]
    schema.quotient(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    if head_dim is None:
        head_dim = schema.quotient(hidden_size, heads, "hidden_size", "num_attention_heads")
        if head_dim > schema.MOST_HEAD_DIM:
            raise schema.unsupported(
                "hidden_size / num_attention_heads", head_dim, f"at most {schema.MOST_HEAD_DIM}"
            )
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def complete_mamba2(values: Mapping[str, Any], keys: Mapping[str, schema.HfKey]) -> dict[str, int]:
    """The size of Mamba-2's heads, by default the inner width's share of each, checked against that width.

    ``keys`` give the names for errors. The inner width is ``mamba_d_ssm`` where a family has that.
    """
    name = {field: keys[field].key or field for field in keys if field.startswith("mamba_")}
    d_inner = values["mamba_expand"] * values["hidden_size"]
    width, product = (
        f"{name['mamba_expand']} × hidden_size",
        f"{values['mamba_expand']} × {values['hidden_size']} = ",
    )
    if values.get("mamba_d_ssm") is not None:
        d_inner, width, product = values["mamba_d_ssm"], "mamba_d_ssm", ""
    heads, d_head = values["mamba_n_heads"], values["mamba_d_head"]
    d_head = d_inner // heads if d_head is None else d_head
    if d_head * heads != d_inner:
        raise ConfigError(
            f"{name['mamba_n_heads']} × {name['mamba_d_head']} is not {width}",
            found=f"{heads} × {d_head} = {heads * d_head}",
            expected=f"{product}{d_inner}",
            fix="correct these keys in config.json",
        )
    schema.quotient(heads, values["mamba_n_groups"], name["mamba_n_heads"], name["mamba_n_groups"])
    return {"mamba_d_head": d_head}
