"""A config.json without weights is planned in bounded memory, whatever its numbers, or refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from bamba_quant.errors import BambaQuantError, PlanError
from bamba_quant.families import families
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.inspection import inspect_path
from bamba_quant.planning.quantize import plan_quantization
from tests.families.test_config_values import base

NUMBERS = (2**16, 2**31 - 1)


KINDS: tuple[Callable[[Path], object], ...] = (
    lambda directory: plan_conversion(directory, allow_config_only=True).sizes,
    lambda directory: plan_quantization(directory, "fp8-dynamic", allow_config_only=True).sizes,
    lambda directory: plan_quantization(directory, "torchao-int4-g128", allow_config_only=True).sizes,
    lambda directory: inspect_path(directory).formats,
    lambda directory: plan_conversion(directory, vocab_only=True, vocab=False),
)


def plan_all(directory: Path, kinds: Iterable[Callable[[Path], object]] = KINDS) -> list[str]:
    """Plan some kinds of output; the errors."""
    errors = []
    for plan in kinds:
        try:
            plan(directory)
        except BambaQuantError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_large_numbers(family: Any, tmp_path: Path) -> None:
    good = base(family)
    tracemalloc.start()
    try:
        # Two of the five kinds of output in turn, so that two keys meet all of them.
        kinds = itertools.cycle(KINDS)
        for key in sorted(family.hf_schema.names | {"vocab_size"}):
            for number in NUMBERS:
                (tmp_path / "config.json").write_text(json.dumps(good | {key: number}))
                plan_all(tmp_path, itertools.islice(kinds, 2))
        # Sizes that only agree when several are large.
        for sizes in ({"hidden_size": 2**30}, {"hidden_size": 2**20, "expand": 2**11, "mamba_expand": 2**11}):
            (tmp_path / "config.json").write_text(json.dumps(good | sizes))
            with contextlib.suppress(BambaQuantError):
                plan_all(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000_000


def test_a_model_larger_than_any_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(base(next(each for each in families() if each.name == "mamba")) | {"hidden_size": 2**28})
    )
    with pytest.raises(PlanError, match=r"larger than any file[\s\S]*config\.json"):
        inspect_path(tmp_path)
    assert len(plan_all(tmp_path)) == 4
