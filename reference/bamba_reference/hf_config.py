"""Reads any spelling of a Hugging Face Bamba configuration into a ``Config``, or says why it cannot.

A key that changes the mathematics and is not implemented is an error, and so is a key nobody here has heard
of: an ignored key is how a time-step limit or a rotary width gets lost.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from bamba_reference.config import Config, LayerType
from bamba_reference.errors import ConfigError

_MOST_LAYERS = 4096  # no model has more; a damaged number would make a plan of millions of tensors
_MOST = 2**31 - 1  # what every format and kernel counts in

# transformers 5 writes the right-hand spellings for what Granite and older files call the left-hand ones.
LAYER_TYPE_SPELLINGS: dict[str, LayerType] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}


def read_hf_config(hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
    """``Config.from_hf``; defaults are those of transformers' ``BambaConfig``."""
    _refuse_unknown_keys(hf, ignore)
    layer_types = _layer_types(hf)
    hidden_size = _int(hf, "hidden_size")
    heads = _int(hf, "num_attention_heads")
    kv_heads = _int(hf, "num_key_value_heads", default=heads)
    head_dim = _int(hf, "head_dim", default=hidden_size // heads)
    if hf.get("head_dim") is None:
        _quotient(hidden_size, heads, "hidden_size", "num_attention_heads")
    expand = _int(hf, "mamba_expand", default=2)
    mamba_heads = _int(hf, "mamba_n_heads", default=128)
    d_inner = expand * hidden_size
    d_head = d_inner // mamba_heads
    if hf.get("mamba_d_head", "auto") not in ("auto", None):
        d_head = _int(hf, "mamba_d_head")
    if d_head * mamba_heads != d_inner:
        raise ConfigError(
            "mamba_n_heads × mamba_d_head is not mamba_expand × hidden_size",
            found=f"{mamba_heads} × {d_head} = {mamba_heads * d_head}",
            expected=f"{expand} × {hidden_size} = {d_inner}",
            fix="correct these keys in config.json",
        )
    groups = _int(hf, "mamba_n_groups", default=1)
    _quotient(mamba_heads, groups, "mamba_n_heads", "mamba_n_groups")
    _quotient(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    rope_theta, rotary_dim = _rotary(hf, head_dim)
    if hf.get("hidden_act") not in (None, "silu", "swish"):
        raise _unsupported("hidden_act", hf["hidden_act"], "silu")
    return Config(
        vocab_size=_int(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_int(hf, "intermediate_size"),
        layer_types=layer_types,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        attention_bias=_bool(hf, "attention_bias", default=False),
        mlp_bias=_bool(hf, "mlp_bias", default=False),
        hidden_act="silu",
        mamba_expand=expand,
        mamba_n_heads=mamba_heads,
        mamba_d_head=d_head,
        mamba_n_groups=groups,
        mamba_d_state=_int(hf, "mamba_d_state", default=256),
        mamba_d_conv=_int(hf, "mamba_d_conv", default=4),
        mamba_conv_bias=_bool(hf, "mamba_conv_bias", default=True),
        mamba_proj_bias=_bool(hf, "mamba_proj_bias", default=False),
        time_step_limit=_time_step_limit(hf.get("time_step_limit")),
        rms_norm_eps=_positive("rms_norm_eps", hf.get("rms_norm_eps"), default=1e-5),
        tie_word_embeddings=_bool(hf, "tie_word_embeddings", default=False),
        max_position_embeddings=_int(hf, "max_position_embeddings", default=262144),
        bos_token_id=_token_id(hf, "bos_token_id"),
        eos_token_ids=_token_ids("eos_token_id", hf.get("eos_token_id")),
        pad_token_id=_token_id(hf, "pad_token_id"),
    )


# Keys read above or in the helpers below.
_READ = frozenset(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim attn_layer_indices attn_layer_period
    attn_layer_offset layer_types layers_block_type attn_rotary_emb partial_rotary_factor rope_theta
    rope_parameters rope_scaling attention_bias mlp_bias hidden_act mamba_expand mamba_n_heads
    mamba_d_head mamba_n_groups mamba_d_state mamba_d_conv mamba_conv_bias mamba_proj_bias
    time_step_limit rms_norm_eps tie_word_embeddings max_position_embeddings bos_token_id
    eos_token_id pad_token_id sliding_window
    """.split()
)

# Keys that say how to train, load, store, generate or describe, and change no logit of a forward pass.
# mamba_chunk_size belongs here: chunking is exact (Dao and Gu 2024, section 6).
_INERT = frozenset(
    """
    transformers_version torch_dtype dtype use_cache num_logits_to_keep initializer_range
    attention_dropout z_loss_coefficient mamba_chunk_size use_mamba_kernels output_attentions
    output_hidden_states return_dict torchscript pruned_heads chunk_size_feed_forward
    is_encoder_decoder is_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder auto_map name_or_path
    quantization_config pad_vocab_size_multiple router_aux_loss_coef output_router_logits
    use_bfloat16 tf_legacy_loss min_length max_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens mamba_dt_min mamba_dt_max mamba_dt_init_floor hidden_dropout
    hidden_dropout_prob resid_dropout residual_dropout embd_dropout embedding_dropout mlp_dropout
    classifier_dropout gradient_checkpointing pretraining_tp unsloth_version unsloth_fixed
    max_sequence_length model_max_length
    """.split()
)

# Switches of features that are not implemented, harmless while they are off.
_OFF = frozenset({"use_sliding_window", "lm_head_bias", "add_bias_linear", "use_qk_norm"})


def _refuse_unknown_keys(hf: Mapping[str, Any], ignore: Collection[str]) -> None:
    unknown = sorted(
        key
        for key, value in hf.items()
        if key not in _READ
        and key not in _INERT
        and key not in ignore
        and not key.startswith("_")
        # Only null says nothing: 0, false and [] are values, and a key nobody knows may mean anything by them.
        and value is not None
        and not (key in _OFF and value is False)
    )
    if unknown:
        raise ConfigError(
            f"the configuration has {'a key' if len(unknown) == 1 else 'keys'} that might change the mathematics "
            "and that nothing here implements",
            found=", ".join(f"{key} = {reprlib.repr(hf[key])}" for key in unknown),
            expected="the keys of transformers' BambaConfig",
            fix="if a key changes no logit, vouch for it with --ignore-config-key KEY (Config.from_hf(ignore=…))",
        )
    if hf.get("sliding_window") is not None:
        raise _unsupported("sliding_window", hf["sliding_window"], "null (full attention)")


def _layer_types(hf: Mapping[str, Any]) -> tuple[LayerType, ...]:
    count = _int(hf, "num_hidden_layers", most=_MOST_LAYERS)
    named: list[tuple[LayerType, ...]] = []
    for key in ("layer_types", "layers_block_type"):
        spelled = hf.get(key)
        if spelled is None:
            continue
        if not isinstance(spelled, list | tuple):
            raise _unsupported(key, spelled, "a list with one name for each layer")
        for kind in spelled:
            if not isinstance(kind, str) or kind not in LAYER_TYPE_SPELLINGS:
                raise _unsupported(key, kind, ", ".join(LAYER_TYPE_SPELLINGS))
        if len(spelled) != count:
            raise ConfigError(f"{key} does not name every layer", found=len(spelled), expected=count)
        named.append(tuple(LAYER_TYPE_SPELLINGS[kind] for kind in spelled))
    for indices in (_attention_indices(hf, count), _periodic_indices(hf, count)):
        if indices is not None:
            kinds: list[LayerType] = ["attention" if i in indices else "mamba" for i in range(count)]
            named.append(tuple(kinds))
    if not named:
        return (LAYER_TYPE_SPELLINGS["mamba"],) * count
    if any(other != named[0] for other in named[1:]):
        raise ConfigError(
            "two keys of the configuration disagree about which layers are attention",
            found="; ".join(
                str([i for i, kind in enumerate(layers) if kind == "attention"]) for layers in named
            ),
            expected="layer_types, layers_block_type, attn_layer_indices and attn_layer_period to say the same",
        )
    return named[0]


def _attention_indices(hf: Mapping[str, Any], count: int) -> Collection[int] | None:
    indices = hf.get("attn_layer_indices")
    if indices is None:
        return None
    if not isinstance(indices, list | tuple) or not all(map(_is_int, indices)):
        raise _unsupported("attn_layer_indices", indices, "a list of whole numbers")
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise ConfigError(
            "attn_layer_indices names layers that are not there",
            found=reprlib.repr(outside),
            expected=f"0 to {count - 1} (num_hidden_layers is {count})",
        )
    return frozenset(indices)


def _periodic_indices(hf: Mapping[str, Any], count: int) -> Collection[int] | None:
    if hf.get("attn_layer_period") is None and hf.get("attn_layer_offset") is None:
        return None
    period = _int(hf, "attn_layer_period")
    offset = _int(hf, "attn_layer_offset", least=0, most=period - 1)
    return range(offset, count, period)


def _rotary(hf: Mapping[str, Any], head_dim: int) -> tuple[float, int]:
    """Base and width of the rotary embedding; half of each head where nothing says otherwise (BambaConfig)."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("", hf)]
    for key in ("rope_scaling", "rope_parameters"):
        nested = hf.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise _unsupported(key, nested, "an object or null")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise _unsupported(f"{key}.rope_type", kind, "default (no scaling)")
        unknown = sorted(set(nested) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if unknown:
            raise _unsupported(
                f"{key}.{unknown[0]}", nested[unknown[0]], "rope_theta and partial_rotary_factor only"
            )
        sources.append((f"{key}.", nested))
    thetas = {
        _positive(f"{prefix}rope_theta", source["rope_theta"])
        for prefix, source in sources
        if source.get("rope_theta") is not None
    }
    if len(thetas) > 1:
        raise ConfigError(
            "rope_theta stands twice, with different values",
            found=sorted(thetas),
            expected="one value, at the top or in rope_parameters",
        )
    widths: dict[str, int] = {}
    for prefix, source in sources:
        if source.get("partial_rotary_factor") is not None:
            key, found = f"{prefix}partial_rotary_factor", source["partial_rotary_factor"]
            factor = _positive(key, found)
            if factor > 1:
                raise _unsupported(key, found, "at most 1, which rotates the whole head")
            widths[f"{key} = {factor}"] = int(head_dim * factor)
    if hf.get("attn_rotary_emb") is not None:
        widths[f"attn_rotary_emb = {hf['attn_rotary_emb']}"] = _int(hf, "attn_rotary_emb")
    if len(set(widths.values())) > 1:
        raise ConfigError(
            "the configuration gives the rotary width twice, differently",
            found="; ".join(f"{key} → {width} of {head_dim}" for key, width in widths.items()),
            expected="attn_rotary_emb = partial_rotary_factor × head size",
            fix="keep the one the model was trained with",
        )
    rotary_dim = next(iter(widths.values()), head_dim // 2)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise _unsupported(
            "attn_rotary_emb", rotary_dim, f"an even number from 2 to the head size, {head_dim}"
        )
    return (thetas.pop() if thetas else 10000.0), rotary_dim


def _time_step_limit(value: Any) -> tuple[float, float]:
    if value is None:
        return (0.0, math.inf)
    expected = "two numbers, the second of which may be Infinity"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _unsupported("time_step_limit", value, expected)
    low, high = (_number("time_step_limit", bound, expected) for bound in value)
    if not low < high:
        raise _unsupported("time_step_limit", value, "a lower bound under the upper one")
    return low, high


def _number(key: str, value: Any, expected: str) -> float:
    """A JSON number, or infinity in transformers 5's ``{"__float__": "Infinity"}`` or as a string."""
    read = value
    if isinstance(read, Mapping) and len(read) == 1:
        read = read.get("__float__")
    if isinstance(read, bool) or not isinstance(read, int | float | str):
        raise _unsupported(key, value, expected)
    try:
        return float(read)
    except (ValueError, OverflowError) as error:
        raise _unsupported(key, value, expected) from error


def _positive(key: str, value: Any, default: float = math.nan) -> float:
    """A number above zero that float32 holds: what norms and rotations are computed in."""
    if value is None:
        return default
    expected = "a positive finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unsupported(key, value, expected)
    number = _number(key, value, expected)
    if not 1e-37 < number < 1e38:
        raise _unsupported(key, value, expected)
    return number


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    """Ids of one token or of a list; -1 says that there is none, as older tools write it."""
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(_is_int(token) and -1 <= token <= _MOST for token in ids):
        raise _unsupported(key, value, "a token id, a list of them, or null")
    return tuple(token for token in ids if token >= 0)


def _token_id(hf: Mapping[str, Any], key: str) -> int | None:
    if isinstance(hf.get(key), list | tuple):
        raise _unsupported(key, hf[key], "one token id, or null")
    return next(iter(_token_ids(key, hf.get(key))), None)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(
    hf: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = _MOST
) -> int:
    value = hf.get(key)
    if value is None:
        if default is None:
            raise ConfigError(
                f"the configuration lacks {key}", expected=f"a whole number under the key {key}"
            )
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _unsupported(key, value, f"a whole number from {least} to {most}")
    return value


def _bool(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _unsupported(key, value, "true or false")
    return value


def _quotient(whole: int, part: int, whole_name: str, part_name: str) -> int:
    if whole % part:
        raise ConfigError(
            f"{part_name} does not divide {whole_name}", found=f"{whole} / {part}", expected="a whole number"
        )
    return whole // part


def _unsupported(key: str, value: object, supported: str) -> ConfigError:
    return ConfigError(
        f"the configuration's {key} is not supported", found=reprlib.repr(value), expected=supported
    )
