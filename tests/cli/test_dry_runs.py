"""Dry runs: a summary by role that fits the terminal, every tensor on request, and the same JSON in any width."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bamba_quant.embedded import embedded_model
from tests.planning.test_quantize import BAMBA_9B
from tests.support.command import run
from tests.support.models import random_bamba, save_checkpoint

WIDTHS = (60, 80, 120)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bamba-9B's configuration."""
    file = tmp_path_factory.mktemp("x") / "config.json"
    shutil.copy(BAMBA_9B, file)
    return file


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "--outtype", "q4_k_m"),
        ("fp8", "OUT", "--scheme", "tensor"),
        ("int4", "OUT", "--asymmetric"),
        ("fp4", "OUT"),
    ],
    ids=lambda words: words[0],
)
def test_the_summary_adds_up_and_fits(
    words: tuple[str, ...], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (words[0], config, *words[1:], "--dry-run")
    plan = json.loads(run(*command, "--json").stdout)
    shown = {}
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        shown[width] = run(*command).stdout
        table = shown[width].partition("(--tensors lists every tensor)")[0].splitlines()
        assert max(map(len, table)) <= width and len(table) > 15
    assert shown[80] == shown[120]
    assert (shown[60] == shown[80]) == (words[0] != "int4")  # whose schemes have long names
    rows = [line.split() for line in table[2:]]
    assert [row[0] for row in rows] == sorted([row[0] for row in rows], key=[row[0] for row in rows].index)
    tensors = len({row["source"] for row in plan["plan"]})
    assert sum(int(row[2]) for row in rows) == tensors == len(plan["plan"])
    parts = [part for row in plan["plan"] for part in row.get("tensors", [row])]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == sum(part["bytes"] for part in parts)
    bits = float(re.search(r"([\d.]+) bits per weight", shown[60])[1])  # type: ignore[index]
    assert bits == pytest.approx(8 * sum(part["bytes"] for part in parts) / plan["weights"], abs=0.005)
    for file in plan["files"]:
        assert f"{file['file']}  {file['bytes']:,} bytes" in shown[60]
    assert json.loads(run(*command, "--json").stdout) == plan


@pytest.mark.parametrize("command", ["convert", "fp8"])
def test_every_tensor_is_a_line(command: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (command, config, *(["out"] if command == "fp8" else []), "--dry-run")
    plan = json.loads(run(*words, "--json").stdout)["plan"]
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = run(*words, "--tensors").stdout
    lines = whole.splitlines()[2 : 2 + len(plan)]
    for line, row in zip(lines, plan, strict=True):
        assert line.startswith(row["source"] + " ") and row["role"] in line and row["source_type"] in line
    assert "too narrow" not in whole
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        lines = run(*words, "--tensors").stdout.splitlines()
        note = lines[2 + len(plan)]
        assert max(map(len, lines[: 2 + len(plan)])) <= width
        assert (note.startswith("(too narrow for: ")) == (lines[2] not in whole.splitlines())


def test_an_export(tmp_path: Path) -> None:
    run("convert", embedded_model(), "-o", tmp_path / "x.gguf", "--type", "q8_0", "-t", 1)
    words = ("export", tmp_path / "x.gguf", tmp_path / "out", "--dry-run")
    assert "blk.0.ssm_in.weight" not in run(*words).stdout
    assert "blk.0.ssm_in.weight" in run(*words, "--tensors").stdout


def test_notes_are_one_a_role(tmp_path: Path) -> None:
    """Short rows do not fill the blocks of q4_k."""
    model = save_checkpoint(random_bamba(), tmp_path / "m")
    words = ("convert", model, "--no-vocab", "--outtype", "q4_k_m", "--dry-run")
    notes = json.loads(run(*words, "--json").stdout)["notes"]
    each = [note for note in notes if " is stored as " in note]
    shown = re.findall(r"note: (\d+) of (\w+) as (\w+): q\w+ needs rows", run(*words).stdout)
    assert len(each) == sum(int(n) for n, _, _ in shown) > len(shown) == len(set(shown)) > 3
    every = run(*words, "--tensors").stdout
    assert all(f"note: {note}\n" in every for note in notes)


@pytest.mark.parametrize("command", ["convert", "fp8", "int4", "export"])
def test_tensors_are_of_a_dry_run(command: str, tmp_path: Path) -> None:
    words = [] if command == "convert" else [tmp_path / "out"]
    done = run(command, embedded_model(), *words, "--tensors", code=2)
    assert "has no effect without --dry-run" in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
