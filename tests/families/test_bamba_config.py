"""What a Bamba configuration may say in several ways, and what is refused by key and value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bamba_quant.errors import ArchitectureError, ConfigError
from bamba_quant.families import family_of, read_config
from bamba_quant.families.bamba import BAMBA

GOOD: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"],
    "model_type": "bamba",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "attn_rotary_emb": 8,
    "rope_theta": 10000.0,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 2,
}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        (
            "rope_theta",
            ["abc", [1], math.nan, 0, -1, math.inf, True, {"__float__": "Infinity"}, 10**400, 1e300],
        ),
        ("rms_norm_eps", [math.nan, 0, -1, math.inf, True, "x", {"x": 1}, 1e-300]),
        ("attn_layer_indices", ["abc", 5, ["1"], [None], [1.5], [True], [4], [-1]]),
        ("layer_types", [5, [[1]] * 4, "mamba", ["mamba"]]),
        ("partial_rotary_factor", ["x", [1], math.nan, math.inf, 0, 2, True]),
        ("attn_rotary_emb", ["8", 8.0, 0, 7, 18]),
        ("eos_token_id", ["x", [[1]], -2, 2**40, 1.5, True]),
        ("bos_token_id", [{}, 1.5, [], [1]]),
        ("pad_token_id", ["0", -7]),
        ("mamba_n_heads", [0, -8, "8", 8.0, 1e999]),
        ("num_attention_heads", [0, 5]),
        ("num_key_value_heads", [0, 3]),
        ("mamba_n_groups", [0, 3]),
        ("mamba_d_head", [0, "x", []]),
        ("head_dim", [0, "x"]),
        ("mamba_d_conv", [0]),
        ("hidden_size", [0, 2**31]),
        ("vocab_size", [0, 161.0, None]),
        ("num_hidden_layers", [0, 4097, 10**9]),
        ("max_position_embeddings", [0, 2**31, 2**40]),
        ("time_step_limit", [5, [0], [0, math.nan], "ab", [0, {"x": 1}], [True, 2], [0, 10**400, 1], [1, 1]]),
        ("rope_parameters", [[], {"rope_type": ["x"]}, {"rope_theta": "x"}, {"partial_rotary_factor": "x"}]),
        ("attn_layer_period", [0, "2"]),
        ("hidden_act", ["", False, ["silu"], "gelu"]),
        ("tie_word_embeddings", ["true", 1]),
    ],
)
def test_a_bad_value_is_named(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as error:
            read_config(GOOD | {key: value})
        assert key in str(error.value), value


def test_what_switches_nothing_on_is_accepted() -> None:
    config = read_config(GOOD)
    harmless = {
        "new_thing": None,
        "use_sliding_window": False,
        "z_loss_coefficient": 0.0,
        "attention_dropout": 0,
    }
    assert read_config(GOOD | harmless) == config
    with pytest.raises(ConfigError, match="use_sliding_window"):
        read_config(GOOD | {"use_sliding_window": True})
    with pytest.raises(ConfigError, match="use_sliding_window"):
        read_config(GOOD | {"use_sliding_window": 0})


def test_layers_said_by_period() -> None:
    spelled = {"attn_layer_indices": None, "attn_layer_period": 2, "attn_layer_offset": 1}
    assert read_config(GOOD | spelled).attention_layers == (1, 3)
    with pytest.raises(ConfigError, match="disagree"):
        read_config(GOOD | spelled | {"attn_layer_indices": [1]})


def test_half_a_period() -> None:
    with pytest.raises(ConfigError, match="lacks attn_layer_period"):
        read_config(GOOD | {"attn_layer_offset": 1})
    with pytest.raises(ConfigError, match="attn_layer_offset"):
        read_config(GOOD | {"attn_layer_period": 2, "attn_layer_offset": 2})


def test_no_token_spelled_as_minus_one() -> None:
    assert read_config(GOOD | {"pad_token_id": -1, "eos_token_id": [3, -1]}).pad_token_id is None


def test_layers_beyond_llama_cpp() -> None:
    config = read_config(GOOD | {"num_hidden_layers": 513})
    with pytest.raises(ArchitectureError, match="num_hidden_layers = 513"):
        BAMBA.check_gguf(config)


@pytest.mark.parametrize("value", [5, [1], [["x"]], {}, "BambaForCausalLM", ["BambaModel"], True])
def test_architectures_of_another_kind(value: Any) -> None:
    with pytest.raises(ArchitectureError, match="architecture"):
        family_of({"architectures": value, "model_type": "bamba"})


@pytest.mark.parametrize("value", [5, ["bamba"], {}, None])
def test_model_type_of_another_kind(value: Any) -> None:
    with pytest.raises(ArchitectureError, match="model_type"):
        family_of({"model_type": value})
