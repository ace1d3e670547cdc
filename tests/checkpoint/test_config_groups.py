"""Targets of a compressed-tensors configuration match as re.match does, and none takes longer than its share."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.checkpoint.assemble import WeightAssembler
from bamba_quant.checkpoint.compressed_tensors import ConfigGroups
from bamba_quant.errors import CheckpointError

MODULES = [
    f"model.layers.{layer}.{leaf}" for layer in range(12) for leaf in ("mamba.in_proj", "self_attn.q_proj")
]
MODULES += ["lm_head", "model.layers.1.feed_forward.gate_proj"]
PATTERNS = [
    ".*", "lm_head", "model", r"model\.layers\.1\.", r".*self_attn.*", r".*layers\.(0|11)\..*proj$", "^(?!.*mamba).*",
    r".*\.(?P<leaf>q|k|v)_proj$", "(?i)LM_.*", "x", "", ".*gate_proj(?<!x)",
]  # fmt: skip


def groups(*targets: Any) -> ConfigGroups:
    """A group for each list of targets, its number as ``num_bits``."""
    listed = {
        f"group_{number}": {"targets": each, "weights": {"type": "int", "num_bits": number}}
        for number, each in enumerate(targets)
    }
    return ConfigGroups({"config_groups": listed}, WeightAssembler(Path("here"), {}))


def number(found: ConfigGroups, module: str) -> int | None:
    try:
        weights: dict[str, int] = found.find(module, "int")["weights"]
    except CheckpointError:
        return None
    return weights["num_bits"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_re_match(pattern: str) -> None:
    found = groups([f"re:{pattern}"])
    for module in MODULES:
        assert (number(found, module) is not None) == (re.match(pattern, module) is not None), module


def test_names_before_classes_in_the_order_of_groups() -> None:
    found = groups(["Linear"], ["lm_head", 5, None], ["re:.*lm_head"], ["re:.*q_proj"])
    assert number(found, "lm_head") == 1
    assert number(found, "model.layers.0.self_attn.q_proj") == 3
    assert number(found, "other") == 0
    assert number(groups(["x"]), "other") is None


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|a)*$", "(.*)*x", "((a|b|ab)*)*c", "(?:a?){60}a{60}"])
def test_expressions_that_take_exponential_time(pattern: str) -> None:
    started = time.process_time()
    found = groups([f"re:{pattern}"])
    try:
        for length in range(20, 400, 20):
            found.find("a" * length + "!", "int")
    except CheckpointError as error:
        assert "no group" in str(error) or "within" in str(error)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (["re:["], "regular expression"),
        (["re:(?R)"], "regular expression"),
        (["re:" + "(" * 400 + ")" * 400], "regular expression"),
        (["re:a{99999999999}"], "regular expression"),
        (["re:" + "x" * 2000], "at most 1000 characters"),
        (["re:x"] * 2000, "at most 1000"),
    ],
)
def test_expressions_that_are_refused(targets: list[str], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        groups(targets).find("lm_head", "int")


def test_many_names_take_linear_time() -> None:
    names = [f"model.layers.{number}" for number in range(50_000)]
    started = time.process_time()
    found = groups(names)
    assert all(number(found, name) == 0 for name in names)
    assert time.process_time() - started < 5
