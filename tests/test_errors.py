"""An error says what, where, found, expected and fix, in few lines, whatever its parts are."""

from __future__ import annotations

from typing import Any

import pytest

from bamba_quant.errors import BambaQuantError, CheckpointError, did_you_mean, join_names
from bamba_quant.recipes import recipes


def test_its_parts_in_order() -> None:
    error = CheckpointError("wrong", where="a", found=1, expected=[2], fix="do it")
    assert str(error) == "wrong\n  where: a\n  found: 1\n  expected: [2]\n  fix: do it"
    assert str(BambaQuantError("wrong")) == "wrong"
    assert error.args == (str(error),)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 2_300_000, "x\n" * 1_000_000, "\n" * 1_000_000, list(range(500_000)), 10**5000, nested(100_000)],
    ids=["long", "many lines", "empty lines", "a list", "digits", "deep"],
)
def test_bounds(value: Any) -> None:
    error = BambaQuantError(
        str(value) if isinstance(value, str) else "wrong", where=value, found=value, expected=value
    )
    assert len(str(error)) < 5000 and str(error).count("\n") < 60
    assert "more characters)" in str(error) or "cannot be printed" in str(error)
    assert error.found is value


def test_no_value_passes_for_another_part() -> None:
    text = str(BambaQuantError("wrong\n  fix: run this", found="x\n  fix: run this\nerror: y"))
    assert text == "wrong\n      fix: run this\n  found: x\n      fix: run this\n    error: y"


def test_lists() -> None:
    assert join_names(["a"]) == "a"
    assert join_names([str(i) for i in range(100)]) == "0, 1, 2, 3, 4 and 95 more"


def test_the_closest_names() -> None:
    names = [recipe.name for recipe in recipes()]
    assert did_you_mean("q4km", names) == "; did you mean q4_k_m?"
    assert did_you_mean("Q4-K-M", names) == "; did you mean q4_k_m?"
    assert did_you_mean("iq4xs", names) == "; did you mean iq4_xs?"
    assert did_you_mean("q8", names).startswith("; did you mean q8_0")
    assert did_you_mean("gptq", names) == did_you_mean("", names) == did_you_mean("q4km", []) == ""
    assert did_you_mean("abd", ["abc", "abe", "xyz"]) in (
        "; did you mean abc or abe?",
        "; did you mean abe or abc?",
    )
    assert did_you_mean("q4km" + "x" * 2_300_000, names) == ""
