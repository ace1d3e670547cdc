"""The action and the workflows are what GitHub reads, and every command line in them exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bamba_quant.embedded import embedded_model
from bamba_quant.recipes import recipes
from bamba_quant.report.json_report import read_report
from bamba_quant_cli.app import app
from bamba_quant_cli.demo import help_text

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "accuracy"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parsed(file: Path) -> dict[Any, Any]:
    content = yaml.safe_load(file.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


ACTION = parsed(ROOT / "action.yml")


def test_the_action_is_a_composite_one() -> None:
    assert ACTION.keys() == {"name", "description", "author", "branding", "inputs", "outputs", "runs"}
    assert ACTION["runs"]["using"] == "composite"
    for step in ACTION["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert step["name"]
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "an input in a script is a script of its writer"
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    for entry in ACTION["inputs"].values():
        assert entry["description"]
        assert entry.get("required") or isinstance(entry["default"], str)


def test_every_input_is_used_and_every_use_is_an_input() -> None:
    text = (ROOT / "action.yml").read_text("utf-8")
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == ACTION["inputs"].keys()


def test_the_script_takes_what_the_action_gives() -> None:
    (step,) = [step for step in ACTION["runs"]["steps"] if ".ci/accuracy" in step.get("run", "")]
    script = SCRIPT.read_text("utf-8")
    documented = set(re.findall(r"^#   ([A-Z]+) ", script, flags=re.M))
    assert step["env"].keys() == documented
    used = set(re.findall(r"\$\{?([A-Z]+)\b", script))
    assert used == documented


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows(file: Path) -> None:
    workflow = parsed(file)
    assert workflow[True], "YAML reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if step.get("uses") == "./":
                assert step["with"].keys() <= ACTION["inputs"].keys()
                assert (
                    ACTION["inputs"].keys() - {k for k, v in ACTION["inputs"].items() if "default" in v}
                    <= step["with"].keys()
                )
                assert (ROOT / step["with"]["gates"]).is_file()
                assert (ROOT / step["with"]["model"] / "config.json").is_file()
            for target in re.findall(r"make (\w+)", step.get("run", "")):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.M)


def options(command: str) -> set[str]:
    return {
        name
        for parameter in COMMANDS[command].params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def test_every_command_and_option_exists() -> None:
    lines = re.sub(r"\\\n", " ", SCRIPT.read_text("utf-8"))
    commands = re.findall(r"^(?!#).*?\bbamba-quant (\w+) ([^\n;]*)", lines, flags=re.M)
    assert {name for name, _ in commands} == {"convert", "fp8", "int4", "fp4", "evaluate"}
    for name, arguments in commands:
        assert set(re.findall(r"(?<!\S)--[\w-]+", arguments)) <= options(name)
    (arguments,) = re.findall(r"^arguments=\((.*)\)$", lines, flags=re.M)
    more = re.findall(r"arguments\+=\((.*?)\)", lines)
    assert set(re.findall(r"--[\w-]+", " ".join([arguments, *more]))) <= options("evaluate")


def test_every_type_in_the_workflows_exists() -> None:
    known = {recipe.name for recipe in recipes()} | {"fp8", "fp8-tensor", "fp8-block", "int4", "fp4"}
    known |= {f"{kind}-tuned" for kind in known}
    named = [ACTION["inputs"]["types"]["default"]]
    named += [
        step["with"]["types"]
        for file in WORKFLOWS
        for job in parsed(file)["jobs"].values()
        for step in job["steps"]
        if step.get("uses") == "./"
    ]
    assert {kind for types in named for kind in types.split()} <= known


def run_script(tmp_path: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    """The script as the action calls it, with ``bamba-quant`` being this Python's."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "bamba-quant").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bamba_quant_cli "$@"\n'
    )
    (tools / "bamba-quant").chmod(0o755)
    (tools / "python").unlink(missing_ok=True)
    (tools / "python").symlink_to(sys.executable)
    names = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        ["bash", str(SCRIPT)],
        env=os.environ | names | {"PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_script_makes_a_report_and_fails_on_a_gate(tmp_path: Path) -> None:
    gates = tmp_path / "gates.toml"
    gates.write_text("[default]\nmax-kld = 0.02\n")
    text = tmp_path / "text.txt"
    text.write_text(help_text())
    common = {
        "MODEL": embedded_model(),
        "GATES": gates,
        "CTX": 64,
        "CHUNKS": 12,
        "TEXT": text,
        "OUT": tmp_path / "out",
    }
    done = run_script(tmp_path, TYPES="q8_0 fp8", **common)
    assert done.returncode == 0, done.stderr
    evaluation = read_report(tmp_path / "out" / "report" / "report.json")
    assert [candidate.model.recipe for candidate in evaluation.candidates] == ["q8_0", "fp8-dynamic"]
    assert evaluation.passed
    made = tmp_path / "out" / "bamba-mini-q8_0.gguf"
    done = run_script(tmp_path, TYPES="q2_k", FILES=f"{made}\n", **common)
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout
    assert "FAIL" in (tmp_path / "out" / "report" / "report.md").read_text("utf-8").splitlines()[0]
    assert len(read_report(tmp_path / "out" / "report" / "report.json").candidates) == 2


def test_the_script_ends_with_the_first_error(tmp_path: Path) -> None:
    done = run_script(tmp_path, MODEL=tmp_path / "nowhere", OUT=tmp_path / "out")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert run_script(tmp_path, OUT=tmp_path / "out").returncode != 0


@pytest.mark.parametrize("kind", ["../../x", "q8_0/../x", "--help", "q8_0;x", "*"])
def test_a_type_is_never_a_path_or_an_option(kind: str, tmp_path: Path) -> None:
    done = run_script(
        tmp_path, MODEL=embedded_model(), TYPES=f"q8_0 {kind}", OUT=tmp_path / "a" / "b" / "out"
    )
    assert done.returncode == 2 and "TYPES has a name that no type has" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_models_and_candidates_are_never_options(tmp_path: Path) -> None:
    common: dict[str, object] = {"TYPES": "", "CTX": 64, "CHUNKS": 2, "OUT": tmp_path / "out"}
    for names in (
        {"MODEL": embedded_model(), "FILES": f"--save-base={tmp_path / 'x'}\n"},
        {"MODEL": "--version", "TYPES": "q8_0"},
    ):
        done = run_script(tmp_path, **common | names)
        assert done.returncode == 2 and "there is no such file or directory" in done.stderr, done.stdout
    assert not (tmp_path / "x").exists()
