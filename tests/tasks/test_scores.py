"""Scores of tasks in an evaluation, question by question against the base, and the harness' command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.metrics import mean_stderr
from typer.testing import CliRunner

from bamba_quant.embedded import embedded_model
from bamba_quant.report.json_report import read_report
from bamba_quant.tasks.errors import TaskError
from bamba_quant.tasks.harness import open_tasks
from bamba_quant_cli.app import app
from tests.support.conversion import to_gguf
from tests.support.tasks import CHOICE, TASKS, write_task, write_tasks

QUESTIONS = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks, a lossy file and a text."""
    from pydoc_data.topics import topics

    made = tmp_path_factory.mktemp("evaluation")
    text = "\n".join(topics[name] for name in sorted(topics))[:40_000]
    write_tasks(made / "tasks", text, QUESTIONS)
    (made / "text.txt").write_text(text[:3000])
    to_gguf(embedded_model(), made / "q2_k.gguf", "q2_k")
    return made


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.output


def refusal(*arguments: object) -> str:
    """The error of a command line, which the command's entry point prints."""
    with pytest.raises(TaskError) as error:
        CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    return str(error.value)


def test_an_evaluation_with_tasks(directory: Path, tmp_path: Path) -> None:
    printed = invoke(
        "evaluate", embedded_model(), directory / "q2_k.gguf", "--text", directory / "text.txt", "--ctx", 64,
        "--chunks", 8, "--resamples", 1000, "--tasks", ",".join(TASKS), "--include-path", directory / "tasks",
        "--limit", QUESTIONS - 1, "--report-dir", tmp_path / "report",
    )  # fmt: skip
    evaluation = read_report(tmp_path / "report" / "report.json")
    results = {(each.task, each.metric): each for each in evaluation.tasks}
    assert {task for task, _ in results} == set(TASKS)
    assert all(each.questions == QUESTIONS - 1 for each in evaluation.tasks)
    labels = [evaluation.base.label, evaluation.candidates[0].model.label]
    assert all([score.label for score in each.scores] == labels for each in evaluation.tasks)

    # The same files in the harness' own command line, whose samples say which questions each answers.
    right = []
    for number, model in enumerate((embedded_model(), directory / "q2_k.gguf")):
        invoke(
            "lm-eval", model, "--tasks", CHOICE, "--include_path", directory / "tasks", "--limit", QUESTIONS - 1,
            "--output_path", tmp_path / f"{number}", "--log_samples",
        )  # fmt: skip
        (samples,) = (tmp_path / f"{number}").rglob("samples_*.jsonl")
        listed = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda each: each["doc_id"])
        right.append(np.array([each["acc"] for each in listed]))
    base, candidate = results[CHOICE, "acc"].scores
    assert base.value == right[0].mean() and candidate.value == right[1].mean()
    assert base.error == pytest.approx(mean_stderr(right[0].tolist()))
    assert base.difference is base.flips is None
    assert candidate.difference == pytest.approx((right[1] - right[0]).mean())
    assert candidate.difference_error == pytest.approx(mean_stderr((right[1] - right[0]).tolist()))
    assert candidate.flips is not None
    assert candidate.flips.lost == (right[0] > right[1]).sum()
    assert candidate.flips.gained == (right[1] > right[0]).sum()

    bits = results["whole-text", "bits_per_byte"].scores[1]
    assert bits.value is not None and math.isfinite(bits.value)
    assert bits.error is bits.difference_error is bits.flips is None and bits.difference is not None
    for shown in (
        printed,
        *((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html")),
    ):
        assert CHOICE in shown.replace("<wbr>", "")  # where a line may end
        assert f"{candidate.value:.4f} ± {candidate.error:.4f}" in shown


def test_tasks_are_opened_before_anything_is_measured(directory: Path, tmp_path: Path) -> None:
    found = refusal(
        "evaluate", embedded_model(), directory / "q2_k.gguf", "--text", tmp_path / "missing.txt",
        "--tasks", f"{CHOICE},no-such-task", "--include-path", directory / "tasks",
    )  # fmt: skip
    assert "the harness has no such task" in found and "found: no-such-task" in found
    with pytest.raises(TaskError, match="no such directory of tasks"):
        open_tasks([CHOICE], tmp_path / "missing")
    write_task(tmp_path, "broken", "multiple_choice", [{"a": 1}])
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(TaskError, match=r"DatasetGenerationError: [^\0]+ArrowInvalid: JSON parse error"):
        open_tasks(["broken"], tmp_path)


def test_patterns_of_names(directory: Path) -> None:
    assert open_tasks(["which-*", CHOICE], directory / "tasks").names == (CHOICE,)
    file = str(directory / "tasks" / f"{CHOICE}.yaml")
    assert open_tasks([file]).names == (file,)


def test_the_harness_command_line(directory: Path) -> None:
    assert "MODEL, or --model bamba-quant" in " ".join(invoke("lm-eval", "--help").split())
    assert "--tasks" in invoke("lm-eval", "run", "--help")
    assert CHOICE in invoke("lm-eval", "ls", "tasks", "--include_path", directory / "tasks")
    arguments = f"pretrained={embedded_model()},dtype=float32,backend=torch,batch_size=2"
    printed = invoke(
        "lm-eval", "--model", "bamba-quant", "--model_args", arguments, "--tasks", CHOICE,
        "--include_path", directory / "tasks", "--limit", "2",
    )  # fmt: skip
    assert CHOICE in printed and "acc_norm" in printed
    assert "found: no-such-command" in refusal("lm-eval", "no-such-command", "--tasks", CHOICE)
    assert "Tasks not found: no-such-task" in refusal("lm-eval", embedded_model(), "--tasks", "no-such-task")
