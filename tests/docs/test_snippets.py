"""The commands and the code in README and the documentation run, on the embedded model and short texts.

A fenced block that cannot run here has a comment with the reason on the line before it: ``<!-- not run: … -->``.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.recipes import read_recipe
from bamba_quant.recipes.mixtures import read_mixture
from bamba_quant.releases.preset import read_preset
from bamba_quant_cli.app import app
from bamba_quant_cli.demo import help_text
from tests.support.conversion import faulty
from tests.support.tasks import quick_harness, write_tasks

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
MOST_NOT_RUN = 12

_BLOCK = re.compile(
    r"^ *(?:<!-- not run: (?P<reason>[^\n]+) -->\n *)?```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)

# Tests have no GPU, and little work is enough. Tuning is only planned: tests/cli/test_tuning.py runs it.
_ON_GPU = re.compile(r" --(?:tune-)?device cuda| --dtype bfloat16")
_MORE = {
    "allocate": "--overwrite --ctx 64 --chunks 2 --types q4_k,q5_k,q6_k --no-refine",
    "convert": "--overwrite",
    "evaluate": "--overwrite --ctx 64 --chunks 4",
    "export": "--overwrite",
    "fp4": "--overwrite --scales absmax",
    "fp8": "--overwrite --scales absmax",
    "generate": "--max-tokens 3",
    "imatrix": "--overwrite",
    "int4": "--overwrite --method rtn",
    "perplexity": "--ctx 64",
    "quantize": "--overwrite --method absmax",
    "release": "--dry-run",
}


@dataclass(frozen=True)
class Snippet:
    """A fenced block: where it is, its language, its text, and why it is not run, if it is not."""

    place: str
    language: str
    text: str
    not_run: str | None


@cache
def snippets(file: Path) -> tuple[Snippet, ...]:
    content = file.read_text("utf-8")
    return tuple(
        Snippet(
            f"{file.name}:{content.count(chr(10), 0, found.start()) + 1}",
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in _BLOCK.finditer(content)
    )


def languages(*names: str) -> list[Path]:
    """The files with a block in one of these languages that runs."""
    return [f for f in FILES if any(s.language in names and s.not_run is None for s in snippets(f))]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the documentation takes as given: a model, texts, GGUF files, gates."""
    directory = tmp_path_factory.mktemp("material")
    # Without its model card, which would name the files that commands make.
    shutil.copytree(embedded_model(), directory / "Bamba-9B", ignore=shutil.ignore_patterns("README.md"))
    help_, half = help_text(), len(help_text()) // 2
    (directory / "calib.txt").write_text(help_[half : half + 24_000])
    (directory / "some.txt").write_text(help_[:6_000])
    (directory / "gates.toml").write_text("[default]\nmax-kld = 10.0\n")
    write_tasks(directory / "tasks", help_[:24_000], count=2)
    model = str(directory / "Bamba-9B")
    names = {"q8_0": "q8_0", "q4_k_m": "q4_k_m", "bamba-9b-Q8_0": "q8_0", "tuned": "q4_k_m"}
    for name, outtype in {**names, "Bamba-9B/Bamba-9B-Q4_K_M": "q4_k_m"}.items():
        _run("convert", model, "--outtype", outtype, "--outfile", str(directory / f"{name}.gguf"))
    faulty(directory / "Bamba-9B", directory / "llama.gguf", "q8_0")
    _run("fp8", model, str(directory / "Bamba-9B-FP8"), "--scales", "absmax")
    _run("imatrix", model, "--text", str(directory / "some.txt"), "-o", str(directory / "imatrix.gguf"))
    return directory


def _run(*arguments: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


@pytest.fixture
def inside(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the material, as the current directory."""
    monkeypatch.chdir(shutil.copytree(material, tmp_path / "here"))
    with quick_harness():
        yield Path.cwd()


def arguments_of(line: str) -> list[str]:
    """A command line as the shell splits it, without a GPU and with little to do."""
    words = shlex.split(_ON_GPU.sub("", line), comments=True)[1:]
    more = _MORE.get(words[0], "")
    if "--scheme" in words and words[0] == "allocate":
        words = [
            "4.2MB" if word == "6.5GB" else word for word in words
        ]  # a size between those of the embedded model
        more = "--overwrite --ctx 64 --chunks 2"
    if "--tune" in words:
        more += " --dry-run"
    if words[0] == "convert" and "--outfile" not in words:
        # The default name has the number of weights in it, and the embedded model has fewer than Bamba-9B.
        more += " --outfile Bamba-9B/Bamba-9B-{ftype}.gguf"
    words = [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
    return [*words, *shlex.split(more)]


@pytest.mark.parametrize("file", languages("sh", "bash"), ids=lambda file: file.name)
def test_commands(file: Path, inside: Path) -> None:
    for snippet in snippets(file):
        if snippet.language not in ("sh", "bash") or snippet.not_run is not None:
            continue
        for line in snippet.text.replace("\\\n", " ").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            assert line.startswith("bamba-quant "), f"{snippet.place}: {line}"
            done = CliRunner().invoke(app, arguments_of(line))
            gates = re.search(r" --(max|min)-|--gates ", line)
            known = (0, 1) if gates else (0,)
            assert done.exit_code in known, f"{snippet.place}: {line}\n{done.output}\n{done.exception}"


@pytest.mark.parametrize("file", languages("python"), ids=lambda file: file.name)
def test_python(file: Path, inside: Path) -> None:
    for snippet in snippets(file):
        if snippet.language == "python" and snippet.not_run is None:
            text = snippet.text.replace(
                'TuneOptions(device="cuda")', "TuneOptions(steps=2, tokens=2048, held_out=8)"
            )
            exec(compile(text, snippet.place, "exec"), {"__name__": "snippet"})


def test_recipes(tmp_path: Path) -> None:
    found = [
        s for file in languages("toml") for s in snippets(file) if s.language == "toml" and not s.not_run
    ]
    assert found
    for snippet in found:
        (tmp_path / "recipe.toml").write_text(snippet.text)
        if snippet.place.startswith("release.md"):
            assert read_preset(str(tmp_path / "recipe.toml")).types, snippet.place
            continue
        read = read_mixture if "hybrid-" in snippet.text else read_recipe
        assert read(tmp_path / "recipe.toml"), snippet.place


def test_the_action_has_the_inputs_that_the_documentation_gives() -> None:
    inputs = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["inputs"]
    found = [s for file in languages("yaml") for s in snippets(file) if s.language == "yaml"]
    steps = [step for snippet in found for step in yaml.safe_load(snippet.text)]
    assert steps and all(step["with"].keys() <= inputs.keys() for step in steps)


def test_worked_changes_are_those_that_are_tested() -> None:
    toys = [
        file.read_text("utf-8") for name in ("*.py", "*.toml") for file in (ROOT / "tests/toys").rglob(name)
    ]
    shown = [s for s in snippets(CONTRIBUTING) if s.language in ("python", "toml")]
    assert len(shown) > 4
    for snippet in shown:
        assert any(dedent(snippet.text) in toy for toy in toys), snippet.place


def test_few_blocks_are_not_run_and_each_has_a_reason() -> None:
    everything = [snippet for file in (*FILES, CONTRIBUTING) for snippet in snippets(file)]
    reasons = [snippet.not_run for snippet in everything if snippet.not_run is not None]
    assert len(reasons) <= MOST_NOT_RUN
    assert all(len(reason.split()) >= 3 for reason in reasons)
    for snippet in everything:
        assert snippet.not_run or snippet.language in ("sh", "bash", "python", "toml", "yaml"), snippet.place
