"""The files about the project agree with it: make targets, hooks, issue forms, changelog, release workflow."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from bamba_quant import __version__
from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))


def parsed(file: Path) -> dict[Any, Any]:
    content = yaml.safe_load(file.read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def test_make_help_has_a_sentence_for_every_target() -> None:
    # `make test` runs this test: a make within a make prints the directory as well.
    command = ["make", "--no-print-directory", "help"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sentences = dict(line.split(maxsplit=1) for line in printed.splitlines())
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.M)
    assert sentences.keys() == set(phony.split())
    assert all(sentence[0].isupper() and sentence[-1] == "." for sentence in sentences.values())


def test_fast_tests_exist() -> None:
    (block,) = re.findall(r"^FAST_TESTS :=((?:.*\\\n)*.*)$", MAKEFILE, flags=re.M)
    paths = block.replace("\\", " ").split()
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in LONGEST)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (repository,) = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    (block,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M)
    lint = {line.replace("$(BIN)", ".venv/bin").strip().removesuffix(" .") for line in block.splitlines()}
    assert hooks == lint


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_issue_forms(file: Path) -> None:
    form = parsed(file)
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_a_bug_report_has_the_output_of_inspect() -> None:
    fields = {field["id"]: field for field in parsed(FORMS[0])["body"]}
    assert "bamba-quant inspect" in fields["inspect"]["attributes"]["label"]
    assert fields["inspect"]["validations"]["required"]


def test_the_changelog_has_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d{2}-\d{2})?$", text, flags=re.M)
    assert versions == re.findall(r"^## \[(.+?)\]", text, flags=re.M)
    assert versions[:2] == ["Unreleased", __version__]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, flags=re.M)) <= kinds


def test_only_the_publishing_job_has_an_identity() -> None:
    jobs = parsed(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert {name for name, job in jobs.items() if "permissions" in job} == {"publish"}
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert not any("run" in step for step in publish["steps"])


def test_the_citation_and_the_images() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {"hub", "torch", "cuda", "lm-eval"} <= extras.keys()
    for name in ("Dockerfile", "Dockerfile.cuda"):
        (asked,) = re.findall(r"/src\[([\w,-]+)\]", (ROOT / name).read_text("utf-8"))
        assert set(asked.split(",")) <= extras.keys()
