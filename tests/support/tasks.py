"""Tasks of lm-evaluation-harness made from a text, their data in local files: one of each kind of request."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml

CHOICE, ROLLING, GENERATION = TASKS = ("which-continuation", "whole-text", "next-words")


def questions(
    text: str,
    count: int,
    *,
    context: tuple[int, int] = (40, 100),
    choice: tuple[int, int] = (2, 9),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Which of four pieces of the text follows a context; both of so many words (least, most)."""
    drawn, words = random.Random(seed), text.split()

    def piece(start: int, length: int) -> str:
        return " ".join(words[start : start + length])

    found = []
    for _ in range(count):
        long = drawn.randint(*context)
        start = drawn.randrange(len(words) - long - choice[1])
        answer = drawn.randrange(4)
        choices = [piece(drawn.randrange(len(words) - choice[1]), drawn.randint(*choice)) for _ in range(4)]
        choices[answer] = piece(start + long, drawn.randint(*choice))
        found.append({"context": piece(start, long), "choices": choices, "answer": answer})
    return found


def write_task(
    directory: Path, name: str, output_type: str, documents: Iterable[Mapping[str, Any]], **keys: Any
) -> None:
    """A task's YAML file and its data; ``keys`` are further ones of the harness' configuration."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "output_type": output_type,
        "metadata": {"version": 1.0},
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(settings | keys))


def write_tasks(directory: Path, text: str, count: int) -> Path:
    """The three ``TASKS``, with ``count`` questions, texts and contexts, in a new directory."""
    directory.mkdir()
    asked = questions(text, count)
    mean = {"aggregation": "mean", "higher_is_better": True}
    write_task(
        directory, CHOICE, "multiple_choice", asked,
        doc_to_text="context", doc_to_choice="choices", doc_to_target="answer",
        metric_list=[{"metric": name, **mean} for name in ("acc", "acc_norm")],
    )  # fmt: skip
    write_task(
        directory, ROLLING, "loglikelihood_rolling",
        [{"text": each["context"]} for each in asked], doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )  # fmt: skip
    write_task(
        directory, GENERATION, "generate_until",
        [{**each, "next": each["choices"][each["answer"]]} for each in asked],
        doc_to_text="context", doc_to_target="next",
        generation_kwargs={"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match", **mean}],
    )  # fmt: skip
    return directory


@contextmanager
def quick_harness() -> Iterator[None]:
    """The harness without its own thousands of tasks, and without the eleven programs that describe the machine."""
    from lm_eval.tasks import TaskManager

    without_own = partialmethod(TaskManager.__init__, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", without_own)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        patch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # to a stream that ends with the test
        yield
