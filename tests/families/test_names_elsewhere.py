"""Tests of all families take them from the registry: none but the tests of one family names it."""

from __future__ import annotations

import ast
from pathlib import Path

from bamba_quant.families import families
from bamba_quant.families.bamba import BAMBA

TESTS = Path(__file__).parents[1]
# Bamba is what most tests run on.
NAMES = {family.name for family in families()} - {BAMBA.name}
# Blocks are named like these: they are families' names where one of ``BY_NAME`` is given them.
BLOCKS = {"mamba", "mamba2"}
BY_NAME = {"FAMILIES", "random_case", "wide_case"}
ALLOWED = {
    "families": "the tests of each family's own",
    "manifest/models.py": "inputs whose outputs have recorded hashes",
    "planning/test_cache_scales.py": "where attention stands in three families' checkpoints",
    "planning/test_mixtures.py": "mixtures by the names of modules in three families' checkpoints",
    "reference/kernels/test_gradients.py": "a case of the reference that is called like its family",
    "reference/test_transformers_faults.py": "faults of one family's class in transformers",
    "support/published.py": "models on the Hub, each with its family",
    "support/vllm.py": "what vLLM's class of each family does",
    "toys": "the worked change takes the place of one family",
}


def named(file: Path) -> set[str]:
    """The families that a file names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and node.value in NAMES - BLOCKS:
            found.add(str(node.value))
        given = node.args[:1] if isinstance(node, ast.Call) else [getattr(node, "slice", None)]
        of = getattr(node, "func", None) or getattr(node, "value", None)
        if isinstance(of, ast.Name) and of.id in BY_NAME and given and isinstance(given[0], ast.Constant):
            found |= NAMES & {str(given[0].value)}
    return found


def test_families_come_from_the_registry() -> None:
    found = {file.relative_to(TESTS).as_posix(): named(file) for file in TESTS.rglob("*.py")}
    naming = {name: families for name, families in found.items() if families}
    elsewhere = {
        name: each for name, each in naming.items() if not any(name.startswith(one) for one in ALLOWED)
    }
    assert not elsewhere, "iterate tests.support.families, and make what is special an attribute of the cases"
    for allowed in ALLOWED:
        assert any(name.startswith(allowed) for name in naming), f"{allowed} names no family any more"
