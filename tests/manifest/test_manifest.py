"""Some outputs of each command are the manifest's; ``python -m tests.manifest`` compares all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.manifest.cases import QUICK, Case, cases
from tests.manifest.files import numbers_of
from tests.manifest.runner import Runner, differences, read_manifest

_CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Works in a directory of its own, which is the current one meanwhile."""
    before = Path.cwd()
    yield Runner(tmp_path_factory.mktemp("manifest"))
    os.chdir(before)


@pytest.mark.parametrize("case", [_CASES[name] for name in QUICK], ids=lambda case: case.name)
def test_outputs_are_the_manifest_s(case: Case, runner: Runner) -> None:
    assert not differences(read_manifest()[case.name], runner.run(case))


def test_manifest_has_an_entry_for_each_case() -> None:
    assert sorted(read_manifest()) == sorted(_CASES)


def test_differences_are_found() -> None:
    expected = {"a": "1", "b": "2", "c": 1.0, "d": 2.0}
    found = {"a": "1", "b": "3", "c": 1.001, "d": 2.1, "e": "4"}
    assert differences(expected, found) == ["b: 3, not 2", "d: 2.1, not 2.0", "e: new"]
    assert differences(found, expected)[-1] == "e: absent"


def test_numbers_of_a_report_depend_on_their_order() -> None:
    assert numbers_of({"x": [1, 2], "seconds": 5}) == {"x.*": 5.0}
    assert numbers_of([{"y": 2}, {"y": 1}]) == {"*.y": 4.0}
