"""What every family's configuration reader needs: single values read strictly, and the keys that mean nothing.

A reader names the keys it reads; together with ``INERT`` these are all that may stand in a configuration. A key
nobody here has heard of is an error, because an ignored key is how a time-step limit or a rotary width gets
lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from bamba_reference.config import Block
from bamba_reference.errors import ConfigError, repr_short

MOST_LAYERS = 1024  # no model has half as many; a damaged number would make a plan of millions of tensors
MOST_TOKENS = 2**21  # the largest vocabularies have about 500,000; a plan lists every token
MOST_HEAD_DIM = 2**16  # a plan lists the rows of a head
MOST = 2**31 - 1  # what every format and kernel counts in
NO_POSITIONS = 2**20  # positions of a model that has none: llama.cpp's converter writes this context too

# transformers 5 writes the right-hand spellings for what Granite and older files call the left-hand ones.
LAYER_TYPE_SPELLINGS: dict[str, Block] = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}

# Keys that every reader reads: which family it is, and the tokens.
COMMON = frozenset("architectures model_type vocab_size bos_token_id eos_token_id pad_token_id".split())

# Keys that say how to train, load, store, generate or describe, and change no logit of a forward pass.
# The chunk sizes belong here: chunking is exact (Dao and Gu 2024, section 6).
INERT = frozenset(
    """
    transformers_version torch_dtype dtype use_cache num_logits_to_keep initializer_range
    attention_dropout z_loss_coefficient mamba_chunk_size chunk_size use_mamba_kernels output_attentions
    output_hidden_states return_dict torchscript pruned_heads chunk_size_feed_forward
    is_encoder_decoder is_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix sep_token_id decoder_start_token_id
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder auto_map name_or_path
    quantization_config bamba_quant router_aux_loss_coef output_router_logits
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


def refuse_unknown_keys(
    hf: Mapping[str, Any], read: Collection[str], ignore: Collection[str], family: str
) -> None:
    """Raise ``ConfigError`` if a key is neither read nor inert nor ``ignore``\\ d; ``family`` names the reader."""
    unknown = sorted(
        key
        for key, value in hf.items()
        if key not in read
        and key not in COMMON
        and key not in INERT
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
            found=", ".join(f"{key} = {repr_short(hf[key])}" for key in unknown[:8])
            + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
            expected=f"the keys of {family}",
            fix="if a key changes no logit, vouch for it with --ignore-config-key KEY (read_config(ignore=…))",
        )


def layer_types_named(hf: Mapping[str, Any], count: int) -> list[tuple[Block, ...]]:
    """The kinds of ``count`` layers, once for each key that lists them by name."""
    named: list[tuple[Block, ...]] = []
    for key in ("layer_types", "layers_block_type"):
        spelled = hf.get(key)
        if spelled is None:
            continue
        if not isinstance(spelled, list | tuple):
            raise unsupported(key, spelled, "a list with one name for each layer")
        for kind in spelled:
            if not isinstance(kind, str) or kind not in LAYER_TYPE_SPELLINGS:
                raise unsupported(key, kind, ", ".join(LAYER_TYPE_SPELLINGS))
        if len(spelled) != count:
            raise ConfigError(f"{key} does not name every layer", found=len(spelled), expected=count)
        named.append(tuple(LAYER_TYPE_SPELLINGS[kind] for kind in spelled))
    return named


def alike(block: Block, count: int) -> tuple[Block, ...]:
    """``count`` times one block."""
    return (block,) * count


def agreed(named: list[tuple[Block, ...]], default: tuple[Block, ...]) -> tuple[Block, ...]:
    """The value that all of ``named`` have, ``default`` if there are none."""
    if any(other != named[0] for other in named[1:]):
        raise ConfigError(
            "two keys of the configuration disagree about which layers are attention",
            found="; ".join(
                repr_short([i for i, kind in enumerate(layers) if kind == "attention"]) for layers in named
            ),
            expected="layer_types, layers_block_type, attn_layer_indices and attn_layer_period to say the same",
        )
    return named[0] if named else default


def rope_sources(hf: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects that configure the rotary embedding, (prefix of the key, object): ``hf``, then those in it."""
    sources: list[tuple[str, Mapping[str, Any]]] = [("", hf)]
    for key in ("rope_scaling", "rope_parameters"):
        nested = hf.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            raise unsupported(key, nested, "an object or null")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise unsupported(f"{key}.rope_type", kind, "default (no scaling)")
        unknown = sorted(set(nested) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if unknown:
            raise unsupported(
                f"{key}.{unknown[0]}", nested[unknown[0]], "rope_theta and partial_rotary_factor only"
            )
        sources.append((f"{key}.", nested))
    return sources


def rope_theta(sources: list[tuple[str, Mapping[str, Any]]]) -> float:
    """The base of the rotary embedding, 10000 where nothing says otherwise."""
    thetas = {
        positive(f"{prefix}rope_theta", source["rope_theta"])
        for prefix, source in sources
        if source.get("rope_theta") is not None
    }
    if len(thetas) > 1:
        raise ConfigError(
            "rope_theta stands twice, with different values",
            found=sorted(thetas),
            expected="one value, at the top or in rope_parameters",
        )
    return thetas.pop() if thetas else 10000.0


def mamba2_head_dim(hf: Mapping[str, Any], expand: int, hidden_size: int, heads: int, key: str) -> int:
    """The size of Mamba-2's heads, which ``key`` may give, checked against the width of x.

    ``key`` is ``mamba_d_head`` or ``head_dim``; absent or "auto" means what divides the width.
    """
    d_inner = expand * hidden_size
    d_head = d_inner // heads
    if hf.get(key, "auto") not in ("auto", None):
        d_head = integer(hf, key)
    if d_head * heads != d_inner:
        names = "mamba_n_heads × mamba_d_head is not mamba_expand × hidden_size"
        raise ConfigError(
            names if key == "mamba_d_head" else "num_heads × head_dim is not expand × hidden_size",
            found=f"{heads} × {d_head} = {heads * d_head}",
            expected=f"{expand} × {hidden_size} = {d_inner}",
            fix="correct these keys in config.json",
        )
    return d_head


def only_silu(hf: Mapping[str, Any]) -> str:
    """The activation's name, which can be none but silu."""
    if hf.get("hidden_act") not in (None, "silu", "swish"):
        raise unsupported("hidden_act", hf["hidden_act"], "silu")
    return "silu"


def time_step_limit(key: str, value: Any) -> tuple[float, float]:
    if value is None:
        return (0.0, math.inf)
    expected = "two numbers, the second of which may be Infinity"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise unsupported(key, value, expected)
    low, high = (_number(key, bound, expected) for bound in value)
    if not low < high:
        raise unsupported(key, value, "a lower bound under the upper one")
    return low, high


def _number(key: str, value: Any, expected: str) -> float:
    """A JSON number, or infinity in transformers 5's ``{"__float__": "Infinity"}`` or as a string."""
    read = value
    if isinstance(read, Mapping) and len(read) == 1:
        read = read.get("__float__")
    if isinstance(read, bool) or not isinstance(read, int | float | str):
        raise unsupported(key, value, expected)
    try:
        return float(read)
    except (ValueError, OverflowError) as error:
        raise unsupported(key, value, expected) from error


def positive(key: str, value: Any, default: float = math.nan) -> float:
    """A number above zero that float32 holds: what norms and rotations are computed in."""
    if value is None:
        return default
    expected = "a positive finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unsupported(key, value, expected)
    number = _number(key, value, expected)
    if not 1e-37 < number < 1e38:
        raise unsupported(key, value, expected)
    return number


def token_ids(key: str, value: Any) -> tuple[int, ...]:
    """Ids of one token or of a list; -1 says that there is none, as older tools write it."""
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(is_int(token) and -1 <= token <= MOST for token in ids):
        raise unsupported(key, value, "a token id, a list of them, or null")
    return tuple(token for token in ids if token >= 0)


def token_id(hf: Mapping[str, Any], key: str) -> int | None:
    if isinstance(hf.get(key), list | tuple):
        raise unsupported(key, hf[key], "one token id, or null")
    return next(iter(token_ids(key, hf.get(key))), None)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(
    hf: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = MOST
) -> int:
    value = hf.get(key)
    if value is None:
        if default is None:
            raise ConfigError(
                f"the configuration lacks {key}", expected=f"a whole number under the key {key}"
            )
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise unsupported(key, value, f"a whole number from {least} to {most}")
    return value


def vocab_size(hf: Mapping[str, Any], default: int | None = None) -> int:
    return integer(hf, "vocab_size", default, most=MOST_TOKENS)


def head_dim(hf: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    """The size of attention heads: ``head_dim``, or the hidden size divided by the number of heads."""
    if hf.get("head_dim") is not None:
        return integer(hf, "head_dim", most=MOST_HEAD_DIM)
    size = quotient(hidden_size, heads, "hidden_size", "num_attention_heads")
    if size > MOST_HEAD_DIM:
        raise unsupported("hidden_size / num_attention_heads", size, f"at most {MOST_HEAD_DIM}")
    return size


def boolean(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise unsupported(key, value, "true or false")
    return value


def quotient(whole: int, part: int, whole_name: str, part_name: str) -> int:
    if whole % part:
        raise ConfigError(
            f"{part_name} does not divide {whole_name}", found=f"{whole} / {part}", expected="a whole number"
        )
    return whole // part


def unsupported(key: str, value: object, supported: str) -> ConfigError:
    return ConfigError(
        f"the configuration's {key} is not supported", found=repr_short(value), expected=supported
    )
