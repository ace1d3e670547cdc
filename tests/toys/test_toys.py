"""Adding a codec, a recipe or a family touches one place, and the tests of the registry run over it by themselves.

Each is added to a tree of links to the package, in which the tests run in a process of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOYS = Path(__file__).parent
_RUN = "import sys, pytest; sys.path.insert(0, sys.argv[1]); import bamba_quant; sys.exit(pytest.main(sys.argv[2:]))"


def package_with(addition: Path, parent: str, directory: Path) -> Path:
    """``directory`` with ``bamba_quant`` as links to the real one, and a copy of ``addition`` in its ``parent``.

    A package of that name is replaced, a file by one with the lines of ``addition`` at its end.
    """
    real, linked = ROOT / "bamba_quant", directory / "bamba_quant"
    while True:
        linked.mkdir(parents=True)
        head, _, parent = parent.partition("/")
        for entry in real.iterdir():
            if entry.name not in (head, "__pycache__"):
                (linked / entry.name).symlink_to(entry)
        if not head:
            break
        real, linked = real / head, linked / head
    if addition.is_dir():
        (linked / addition.name).unlink(missing_ok=True)
        shutil.copytree(addition, linked / addition.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        text = (real / addition.name).read_text() + addition.read_text()
        (linked / addition.name).unlink()
        (linked / addition.name).write_text(text)
    return directory


def passed(directory: Path, selected: str, *tests: str, plugins: tuple[str, ...] = ()) -> set[str]:
    """The names of the tests that passed with the package in ``directory``; any other result fails."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "cli", ROOT / "reference")))
    ran = subprocess.run(
        [
            sys.executable, "-c", _RUN, str(directory), "-rA", "-q", "--tb=short", "-p", "no:cacheprovider", "-k",
            selected, *(word for plugin in plugins for word in ("-p", plugin)), *tests,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert not re.search(r"^SKIPPED", ran.stdout, re.MULTILINE), ran.stdout[-5000:]
    return set(re.findall(r"^PASSED \S+?::(\w+)", ran.stdout, re.MULTILINE))


def test_codec(tmp_path: Path) -> None:
    """Q1_0 of ggml, in numpy alone: bytes and numbers are ggml's, and its fields and latent codes go both ways."""
    package = package_with(TOYS / "codec" / "q1_0", "codecs", tmp_path)
    tests = [f"tests/codecs/test_{name}.py" for name in ("bytes", "dispatch", "fields", "refinement")]
    tests += ["tests/calibration/test_latents.py", "tests/evaluation/test_weights_compare.py"]
    found = passed(
        package, "(q1_0 or formats or which) and not cuda", *tests, plugins=("tests.toys.gguf_oracle",)
    )
    assert found >= {
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


def test_recipe(tmp_path: Path) -> None:
    """A recipe like Q5_1 that moves bits: its TOML is read back, and no model takes a byte more than with Q5_1."""
    package = package_with(TOYS / "recipe" / "builtin.toml", "recipes", tmp_path)
    found = passed(package, "q5_1_h or (never_a_byte and 96) or listed", "tests/recipes")
    assert found >= {"test_every_built_in_recipe_is_read_back", "test_never_a_byte_over"}


def test_family(tmp_path: Path) -> None:
    """Falcon-H1 without multipliers, in one file: two mixers in parallel in every layer, through GGUF and back.

    It stands in the place of the built-in family.
    """
    package = package_with(TOYS / "family" / "falcon_h1", "families", tmp_path)
    tests = ("tests/families", "tests/test_families.py", "tests/reference/test_against_transformers.py")
    # The built-in family's own tests, of its multipliers, are in test_falcon_h1.
    selected = "(falcon_h1 or (falcon and h1)) and not any_value and not rounding and not test_falcon_h1"
    found = passed(package, selected, *tests)
    assert found >= {
        "test_table_has_the_references_tensors",
        "test_table_covers_what_transformers_writes",
        "test_gguf_names_are_those_of_gguf_py",
        "test_every_spelling_is_the_same_configuration",
        "test_llama_cpp_computes_what_transformers_does",
        "test_export_is_the_way_back",
        "test_random_models",
    }
