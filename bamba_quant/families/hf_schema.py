"""A family's config.json as a table: the keys it may have, how each is checked, and the field of ``Config`` it gives.

Not pydantic: null means the default here, a key may have two names that must agree, some unknown keys are harmless
while they are off, and every error names the key, the value and what is supported. Of a model of pydantic's, the
checks of integers, booleans and floats would remain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bamba_reference.config import Config
from bamba_reference.errors import ConfigError, repr_short

MOST_LAYERS = 1024  # no model has half as many; a damaged number would make a plan of millions of tensors
MOST_EXPERTS = 1024  # no model has more than half as many; where each is a tensor, a plan lists it
MOST_TOKENS = 2**21  # the largest vocabularies have about 500,000; a plan lists every token
MOST_HEAD_DIM = 2**16  # a plan lists the rows of a head
MOST = 2**31 - 1  # what every format and kernel counts in

REQUIRED: Any = object()
OMITTED: Any = object()
_MISSING = object()
_CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(Config))

# Keys that say which family it is: ``registry.family_of`` reads them.
FAMILY_KEYS = frozenset({"architectures", "model_type"})

# Keys that say how to train, load, store, generate or describe, and change no logit of a forward pass.
# The chunk sizes belong here: chunking is exact (Dao and Gu 2024, section 6).
INERT_KEYS = frozenset(
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


@dataclass(frozen=True)
class HfKey:
    """One key of a config.json.

    ``parse`` returns the value, or raises an error to reject it; ``expected`` describes what it accepts. ``default``
    is used for a missing key, and for null if ``null_is_default``. ``key`` is the key's name (empty: that of its
    entry in the table), ``other_key`` a second name; one with a dot is in a nested object. ``write`` gives the value
    to write for a configuration, ``OMITTED`` for none.
    """

    parse: Callable[[Any], Any]
    expected: str
    default: Any = None
    key: str = ""
    other_key: str = ""
    write: Callable[[Config], Any] | None = None
    null_is_default: bool = True

    def read(self, hf: Mapping[str, Any]) -> Any:
        """The checked value in ``hf``. Raises ``ConfigError``."""
        names = [name for name in (self.key, self.other_key) if name]
        found = [(name, value) for name in names if (value := self._lookup(hf, name)) is not _MISSING]
        if len(found) == 2 and found[0][1] != found[1][1]:
            raise ConfigError(
                f"{names[0]} and {names[1]} are two names of one setting and differ",
                found=" and ".join(repr_short(value) for _, value in found),
                expected="the same value, or one of them alone",
            )
        if found:
            return parsed(self.parse, *found[0], self.expected)
        if self.default is REQUIRED:
            raise ConfigError(
                f"the configuration lacks {self.key}", expected=f"{self.expected} under the key {self.key}"
            )
        return self.default

    def _lookup(self, hf: Mapping[str, Any], name: str) -> Any:
        outer, dot, inner = name.partition(".")
        value = hf.get(outer, _MISSING)
        if dot:
            value = value.get(inner, _MISSING) if isinstance(value, Mapping) else _MISSING
        return _MISSING if value is None and self.null_is_default else value


@dataclass(frozen=True)
class HfSchema:
    """Every key that a family's config.json may have.

    ``keys`` maps names to keys, in the order in which they are written. A name that is a field of ``Config`` gives
    this field. ``complete`` takes all values by name and the parsed config.json, and returns the fields that follow
    from several keys or from none. ``inert`` are further keys that change no logit. ``source`` names where the keys
    are defined, for errors.
    """

    source: str
    keys: Mapping[str, HfKey]
    complete: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]
    inert: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        named = {name: dataclasses.replace(key, key=key.key or name) for name, key in self.keys.items()}
        object.__setattr__(self, "keys", named)

    @property
    def names(self) -> frozenset[str]:
        """The names of all keys that are read, nested ones with a dot."""
        keys = self.keys.values()
        return frozenset(name for key in keys for name in (key.key, key.other_key) if name)

    @property
    def known(self) -> frozenset[str]:
        """The names of all keys that a configuration may have."""
        return self.names | self.inert | FAMILY_KEYS | INERT_KEYS

    def read(self, hf: Mapping[str, Any], ignore: Collection[str]) -> Config:
        """The configuration in ``hf``, of which the keys ``ignore`` may be unknown. Raises ``ConfigError``."""
        self._refuse_unknown_keys(hf, ignore)
        values = {name: key.read(hf) for name, key in self.keys.items()}
        fields = {name: value for name, value in values.items() if name in _CONFIG_FIELDS}
        return Config(**{**fields, **self.complete(values, hf)})

    def write(self, config: Config) -> dict[str, Any]:
        """The keys of a config.json for ``config``."""
        written = {}
        for name, key in self.keys.items():
            if key.write is not None:
                written[key.key] = key.write(config)
            elif name in _CONFIG_FIELDS:
                value = getattr(config, name)
                written[key.key] = shortest(value) if isinstance(value, float) else value
        return {name: value for name, value in written.items() if value is not OMITTED}

    def _refuse_unknown_keys(self, hf: Mapping[str, Any], ignore: Collection[str]) -> None:
        # Only null says nothing: 0, false and [] are values, and a key nobody knows may mean anything by them.
        known, values = self.known, dict(hf)
        for outer in {name.partition(".")[0] for name in known if "." in name}:
            inner = hf.get(outer)
            values |= {f"{outer}.{key}": inner[key] for key in inner} if isinstance(inner, Mapping) else {}
        unknown = sorted(
            key
            for key, value in values.items()
            if key not in known
            and key.rpartition(".")[2] not in ignore
            and not key.startswith("_")
            and value is not None
            and not (key in _OFF and value is False)
        )
        if unknown:
            raise ConfigError(
                f"the configuration has {'a key' if len(unknown) == 1 else 'keys'} that might change the "
                "mathematics and that nothing here implements",
                found=", ".join(f"{key} = {repr_short(values[key])}" for key in unknown[:8])
                + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""),
                expected=f"the keys of {self.source}",
                fix="if a key changes no logit, --ignore-config-key KEY accepts it (read_config(ignore=…))",
            )


def parsed(parse: Callable[[Any], Any], key: str, value: Any, expected: str) -> Any:
    """``parse(value)``. Raises ``ConfigError`` with the key, the value and what is expected where it fails."""
    try:
        return parse(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise unsupported(key, value, expected) from error


def unsupported(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"the configuration's {key} is not supported", found=repr_short(value), expected=expected
    )


def shortest(number: float) -> float:
    """The shortest decimal among those that round to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def require(condition: bool) -> None:
    """Raise ``ValueError`` unless ``condition``: how ``parse`` functions reject a value."""
    if not condition:
        raise ValueError


def count(default: Any = REQUIRED, *, least: int = 1, most: int = MOST, **names: Any) -> HfKey:
    """An integer from ``least`` to ``most``."""

    def parse(value: Any) -> int:
        require(type(value) is int and least <= value <= most)
        return int(value)

    return HfKey(parse, f"a whole number from {least} to {most}", default, **names)


def count_or_null(default: int, **names: Any) -> HfKey:
    """A positive integer with a default for a missing key; null is read as None, not as the default."""
    number = count(default)

    def parse(value: Any) -> int | None:
        return None if value is None else int(number.parse(value))

    return HfKey(parse, f"{number.expected}, or null", default, null_is_default=False, **names)


def count_or_auto(**names: Any) -> HfKey:
    """A positive integer, or "auto", which is read as None."""

    def parse(value: Any) -> int | None:
        require(value == "auto" or (type(value) is int and 1 <= value <= MOST))
        return None if value == "auto" else value

    return HfKey(parse, f'a whole number from 1 to {MOST}, or "auto"', **names)


def flag(default: bool | None, **names: Any) -> HfKey:
    def parse(value: Any) -> bool:
        require(type(value) is bool)
        return bool(value)

    return HfKey(parse, "true or false", default, **names)


def positive(default: float | None, **names: Any) -> HfKey:
    """A number above zero that float32 holds: what norms and rotations are computed in."""

    def parse(value: Any) -> float:
        require(type(value) in (int, float) and 1e-37 < value < 1e38)
        return float(value)

    return HfKey(parse, "a positive finite number", default, **names)


def only(*values: Any, expected: str, **names: Any) -> HfKey:
    """A key that must have one of ``values``, or be null; it is read as the first of them."""

    def parse(value: Any) -> Any:
        require(any(type(value) is type(each) and value == each for each in values))
        return values[0]

    return HfKey(parse, expected, values[0] if values else None, **names)


def unchecked(**names: Any) -> HfKey:
    """A value of any type, which ``complete`` checks."""
    return HfKey(lambda value: value, "", **names)


def token_ids(value: Any) -> tuple[int, ...]:
    """Ids of one token or of a list; -1 means none, as older tools write it."""
    ids = value if isinstance(value, list | tuple) else [value]
    require(all(type(token) is int and -1 <= token <= MOST for token in ids))
    return tuple(token for token in ids if token >= 0)


def time_step_limit(value: Any) -> tuple[float, float]:
    """Two numbers, the first below the second, which may be infinity."""
    require(isinstance(value, list | tuple))
    low, high = map(_bound, value)
    require(low < high)
    return low, high


def _bound(value: Any) -> float:
    """A JSON number, or infinity in transformers 5's ``{"__float__": "Infinity"}`` or as a string."""
    if isinstance(value, Mapping) and len(value) == 1:
        value = value.get("__float__")
    require(type(value) in (int, float, str))
    return float(value)


def quotient(whole: int, part: int, whole_name: str, part_name: str) -> int:
    """``whole`` / ``part``. Raises ``ConfigError`` where a remainder is left."""
    if whole % part:
        raise ConfigError(
            f"{part_name} does not divide {whole_name}", found=f"{whole} / {part}", expected="a whole number"
        )
    return whole // part
