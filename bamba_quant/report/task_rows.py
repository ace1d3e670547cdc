"""Task scores as rows of text, for every form of the report."""

from __future__ import annotations

from collections.abc import Iterator

from bamba_quant.evaluation.result import Evaluation, TaskResult, TaskScore

HEADER = ("task", "metric", "questions", "model", "score", "difference", "lost, gained")
NOTE = (
    "Scores of lm-evaluation-harness, ± one standard error. Differences are from the base, their errors those of the "
    "questions' own differences. Lost and gained are questions whose answer turned wrong or right, with p of McNemar's "
    "exact test."
)


def rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """A row a metric and model, the base first; what a row shares with the one above it is left out."""
    found: list[tuple[str, ...]] = []
    shown = ""
    for result in evaluation.tasks:
        task = "" if result.task == shown else result.task
        shown = result.task
        heading = (task, metric(result), f"{result.questions:,}")
        for row in model_rows(result):
            found.append((*heading, *row))
            heading = ("", "", "")
    return found


def metric(result: TaskResult) -> str:
    """A metric's name, its filter if it has one, and the direction of better scores."""
    direction = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
    return result.metric + ("" if result.filter == "none" else f", {result.filter}") + direction


def model_rows(result: TaskResult) -> Iterator[tuple[str, str, str, str]]:
    """The last columns of ``HEADER``, a row a model."""
    for score in result.scores:
        flips = score.flips
        yield (
            score.label,
            "–" if score.value is None else f"{score.value:.4f}{_error(score)}",
            "" if score.difference is None else f"{score.difference:+.4f}{_error(score, difference=True)}",
            "" if flips is None else f"{flips.lost}, {flips.gained} (p {flips.p_value:.2g})",
        )


def _error(score: TaskScore, difference: bool = False) -> str:
    value = score.difference_error if difference else score.error
    return "" if value is None else f" ± {value:.4f}"
