"""Adding a codec, a recipe or a family touches one place, and the tests of the registry run over it by themselves.

All are added to a tree of links to the package, in which the tests run in one process of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOYS = Path(__file__).parent
_RUN = "import sys, pytest; sys.path.insert(0, sys.argv[1]); import bamba_quant; sys.exit(pytest.main(sys.argv[2:]))"
# What is added to each package of ``bamba_quant``, the tests of the registry that run on it, and which of them.
ADDITIONS: dict[str, tuple[str, list[str], str]] = {
    "codecs": (
        "codec/q1_0",
        [
            "codecs/test_bytes",
            "codecs/test_dispatch",
            "codecs/test_fields",
            "codecs/test_refinement",
            "calibration/test_latents",
            "evaluation/test_weights_compare",
        ],
        "(q1_0 or formats or which) and not cuda",
    ),
    "recipes": (
        "recipe/builtin.toml",
        ["recipes/test_recipe_file", "recipes/test_hybrid"],
        "q5_1_h or (never_a_byte and 96) or listed",
    ),
    # It stands in the place of the built-in family, whose own tests, of its multipliers, are in test_falcon_h1.
    "families": (
        "family/falcon_h1",
        [
            "families/test_tables",
            "families/test_configs",
            "test_families",
            "reference/test_against_transformers",
        ],
        "(falcon_h1 or (falcon and h1)) and not any_value and not rounding",
    ),
}


def package_with_additions(directory: Path) -> Path:
    """``directory`` with ``bamba_quant`` as links to the real one, and copies of what is added.

    A package of that name is replaced, a file by one with the lines of the addition at its end.
    """
    real, linked = ROOT / "bamba_quant", directory / "bamba_quant"

    def link(source: Path, target: Path, without: Iterable[str]) -> None:
        target.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.name not in (*without, "__pycache__"):
                (target / entry.name).symlink_to(entry)

    link(real, linked, ADDITIONS)
    for parent, (name, _, _) in ADDITIONS.items():
        addition = TOYS / name
        link(real / parent, linked / parent, [addition.name])
        target = linked / parent / addition.name
        if addition.is_dir():
            shutil.copytree(addition, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.write_text((real / parent / addition.name).read_text() + addition.read_text())
    return directory


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the tests that passed with the additions; any other result fails."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "cli", ROOT / "reference")))
    selected = " or ".join(
        f"(({chosen}) and ({' or '.join(Path(file).name for file in files)}))"
        for _, files, chosen in ADDITIONS.values()
    )
    tests = [f"tests/{file}.py" for _, files, _ in ADDITIONS.values() for file in files]
    package = package_with_additions(tmp_path_factory.mktemp("package"))
    ran = subprocess.run(
        [
            sys.executable, "-c", _RUN, str(package), "-rA", "-q", "--tb=short", "-p", "no:cacheprovider", "-k",
            selected, "-p", "tests.toys.gguf_oracle", *tests,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert not re.search(r"^SKIPPED", ran.stdout, re.MULTILINE), ran.stdout[-5000:]
    return set(re.findall(r"^PASSED \S+?::(\w+)", ran.stdout, re.MULTILINE))


def test_codec(passed: set[str]) -> None:
    """Q1_0 of ggml, in numpy alone: bytes and numbers are ggml's, and its fields and latent codes go both ways."""
    assert passed >= {
        "test_geometry_is_ggufs",
        "test_bytes_are_ggmls",
        "test_bytes_are_ggmls_for_any_weights",
        "test_numbers_are_read_as_by_gguf_and_ggml",
        "test_weights_up_to_max_abs_stay_finite",
        "test_any_bytes_come_back",
        "test_any_fields_come_back",
        "test_chunks_and_threads_change_nothing",
        "test_the_start_is_the_file",
    }


def test_recipe(passed: set[str]) -> None:
    """A recipe like Q5_1 that moves bits: its TOML is read back, and no model takes a byte more than with Q5_1."""
    assert passed >= {"test_every_built_in_recipe_is_read_back", "test_never_a_byte_over"}


def test_family(passed: set[str]) -> None:
    """Falcon-H1 without multipliers, in one file: two mixers in parallel in every layer, through GGUF and back."""
    assert passed >= {
        "test_table_has_the_references_tensors",
        "test_table_covers_what_transformers_writes",
        "test_gguf_names_are_those_of_gguf_py",
        "test_every_spelling_is_the_same_configuration",
        "test_llama_cpp_computes_what_transformers_does",
        "test_export_is_the_way_back",
        "test_random_models",
    }
