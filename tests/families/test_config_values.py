"""Every key of every family under values of every type: a configuration is read, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bamba_quant.errors import ArchitectureError, ConfigError
from bamba_quant.families import Family, families, read_config
from bamba_quant.families.bamba import BAMBA
from bamba_quant.families.hf_schema import MOST_HEAD_DIM, MOST_LAYERS, MOST_TOKENS
from bamba_reference import Config

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31 - 1, 2**31, 2**63, 10**400, 10**5000, 0.5, 8.0, -0.0, 1e308, math.nan,
    math.inf, -math.inf, "", "x", "auto", "Infinity", "mamba", "x" * 10_000, [], [None], [0], [1, "x"], [[]], [0.0, 1],
    [math.nan, 1], ["mamba"] * 4, ["attention", "mamba"] * 2, {}, {"x": {"x": []}}, {"__float__": "NaN"},
    {"rope_theta": math.nan}, {"rope_type": []}, {"layer": {}}, {"d_state": []}, {"type": 1},
]  # fmt: skip


def base(family: Family) -> dict[str, Any]:
    found = {**family.small_models.keys, "model_type": family.name, "num_hidden_layers": 4}
    if "position_embedding_type" in found:
        found["position_embedding_type"] = "rope"
    return found


def read(values: dict[str, Any]) -> Config | None:
    try:
        return read_config(values)
    except (ArchitectureError, ConfigError) as error:
        assert len(str(error)) < 5000
        return None


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_key_under_every_value(family: Family) -> None:
    good = base(family)
    assert read(good)
    for key in sorted(family.hf_schema.known | {"unknown_key"}):
        for value in VALUES:
            outer, dot, inner = key.partition(".")
            found = read({**good, outer: {inner: value} if dot else value})
            if found is not None:
                assert found.vocab_size <= 2 * MOST_TOKENS
                assert found.num_hidden_layers <= MOST_LAYERS
                assert found.head_dim <= MOST_HEAD_DIM
                assert all(math.isfinite(number) for number in (found.rms_norm_eps, found.rope_theta))


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_sizes_that_a_plan_would_list(family: Family) -> None:
    good = base(family)
    assert read(good | {"vocab_size": MOST_TOKENS})
    with pytest.raises(ConfigError, match="vocab_size"):
        read_config(good | {"vocab_size": MOST_TOKENS + 1})
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        read_config(good | {"num_hidden_layers": MOST_LAYERS + 1})
    if "num_attention_heads" in good:
        wide = {"head_dim": MOST_HEAD_DIM + 2, "num_attention_heads": 4}
        with pytest.raises(ConfigError, match="head_dim"):
            read_config(good | wide)
        if "head_dim" in good:
            return
        huge = {"hidden_size": 2**19, "num_attention_heads": 1, "num_key_value_heads": 1}
        mixer = {
            key: size
            for key, size in (("mamba_n_heads", 2**20), ("mamba_d_head", 1))
            if key in family.hf_schema.known
        }
        with pytest.raises(ConfigError, match="num_attention_heads"):
            read_config(good | huge | mixer)


def test_many_unknown_keys_are_counted() -> None:
    many = {f"unknown_{number}": "x" * 1000 for number in range(10_000)}
    with pytest.raises(ConfigError, match="and 9992 more") as error:
        read_config(base(BAMBA) | many)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "classes", [{"BambaForCausalLM": 1}, ["BambaForCausalLM", 1], [["BambaForCausalLM"]], "Bamba", 5]
)
def test_architectures_that_is_not_a_list_of_names(classes: Any) -> None:
    with pytest.raises(ArchitectureError, match="architectures"):
        read_config(base(BAMBA) | {"architectures": classes})
