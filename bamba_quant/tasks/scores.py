"""Scores of base and candidates on the harness' tasks, question by question against the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from numpy.typing import NDArray

from bamba_quant.evaluation.figures import mcnemar
from bamba_quant.evaluation.result import TaskResult, TaskScore
from bamba_quant.tasks.errors import harness_errors
from bamba_quant.tasks.harness import OpenedTasks
from bamba_quant.tasks.language_model import BambaQuantLM

# A model's score, and the values of its questions where the score is their mean.
_Measured = tuple[float | None, NDArray[np.float64] | None]


def task_results(
    models: Mapping[str, Path],
    tasks: OpenedTasks,
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    **options: Any,
) -> tuple[TaskResult, ...]:
    """Every metric of ``tasks`` for each of ``models``, by label, the base first; one is in memory at a time.

    ``limit`` is the number of questions of each task at most; ``options`` are arguments of ``BambaQuantLM``.
    ``progress`` is called with a model's label before it is run.
    """
    found = []
    for done, (label, path) in enumerate(models.items()):
        progress(label, done, len(models))
        with harness_errors():
            # Without resamples: standard errors are those of means, or of paired differences.
            found.append(
                simple_evaluate(
                    model=BambaQuantLM(path, **options),
                    tasks=list(tasks.names),
                    task_manager=tasks.manager,
                    limit=limit,
                    bootstrap_iters=0,
                )
            )
    base = found[0]
    results = []
    for task, metrics in base["results"].items():
        for key in metrics:
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr"):
                continue
            measured = [_measured(each, task, metric, filter_) for each in found]
            if all(value is None for value, _ in measured):
                continue
            results.append(
                TaskResult(
                    task=task,
                    version=str(base["versions"].get(task, "")),
                    metric=metric,
                    filter=filter_,
                    higher_is_better=base["higher_is_better"].get(task, {}).get(metric),
                    questions=int(metrics.get("sample_len", 0)),
                    scores=tuple(
                        _score(label, each, measured[0], number > 0)
                        for number, (label, each) in enumerate(zip(models, measured, strict=True))
                    ),
                )
            )
    return tuple(results)


def _measured(found: Mapping[str, Any], task: str, metric: str, filter_: str) -> _Measured:
    value = found["results"][task][f"{metric},{filter_}"]
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return None, None
    samples = [each for each in found["samples"].get(task, ()) if each["filter"] == filter_]
    listed = [each.get(metric) for each in sorted(samples, key=lambda each: each["doc_id"])]
    if not listed or not all(isinstance(each, int | float | np.number | np.bool_) for each in listed):
        return float(value), None
    items = np.array(listed, np.float64)
    return float(value), items if math.isclose(items.mean(), value, rel_tol=1e-9) else None


def _score(label: str, own: _Measured, base: _Measured, against: bool) -> TaskScore:
    (value, items), (base_value, base_items) = own, base
    difference = error = flips = None
    if against and value is not None and base_value is not None:
        difference = value - base_value
        if items is not None and base_items is not None:
            error = _standard_error(items - base_items)
            if np.isin([items, base_items], (0, 1)).all():
                flips = mcnemar(int((base_items > items).sum()), int((items > base_items).sum()))
    return TaskScore(label, value, _standard_error(items), difference, error, flips)


def _standard_error(items: NDArray[np.float64] | None) -> float | None:
    """Of the mean of independent questions."""
    if items is None or len(items) < 2:
        return None
    return float(items.std(ddof=1) / math.sqrt(len(items)))
