"""The harness' own command line, and its tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

import bamba_quant.tasks.language_model  # noqa: F401 - registers the model
from bamba_quant.hub import local_path
from bamba_quant.tasks.errors import TaskError, harness_errors

_COMMANDS = ("run", "ls", "validate")


def run_command_line(arguments: Sequence[str]) -> None:
    """The harness' command line, ``lm_eval``, with the model ``bamba-quant``.

    A first argument that is neither an option nor one of its commands is the path of such a model. Raises ``TaskError``
    where the harness does not accept an argument, and ``SystemExit`` as its parser does.
    """
    first, *rest = arguments
    if first.startswith("-"):
        words = ["run", *arguments]
    elif first in _COMMANDS:
        words = list(arguments)
    elif not local_path(first).exists():
        raise TaskError(
            "there is neither such a model nor such a command of the harness",
            found=first,
            expected=f"a directory, a .gguf file, org/name of a model on the Hub, or one of {', '.join(_COMMANDS)}",
        )
    else:
        words = ["run", "--model", "bamba-quant", "--model_args", json.dumps({"pretrained": first}), *rest]
    ours = "bamba-quant" in words or "--model=bamba-quant" in words
    if ours and not _given(words, "--config", "-C"):
        # The harness' own defaults are one context at a time, and a GPU.
        words += [] if _given(words, "--batch_size", "-b") else ["--batch_size", "auto"]
        words += [] if _given(words, "--device") else ["--device", "cpu"]
    before = sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        with harness_errors():
            cli_evaluate()
    finally:
        sys.argv = before


@dataclass(frozen=True)
class OpenedTasks:
    """Tasks of the harness whose data are there, by name or by the path of a YAML file."""

    manager: TaskManager
    names: tuple[str, ...]


def open_tasks(names: Sequence[str], include_path: Path | None = None) -> OpenedTasks:
    """Tasks, groups and patterns of the harness' names, with those of the YAML files in ``include_path``.

    Raises ``TaskError`` for names that it does not have and for tasks that cannot be loaded.
    """
    if include_path is not None and not include_path.is_dir():
        raise TaskError(
            "there is no such directory of tasks",
            where="--include-path",
            found=include_path,
            expected="a directory of YAML files",
        )
    datasets.disable_progress_bars()
    with harness_errors():
        # The harness' own tasks are thousands of files, which take it some ten seconds to list.
        manager = (
            TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None
        )
        if manager is None or not all(_matches(manager, name) for name in names):
            manager = TaskManager(include_path=str(include_path) if include_path else None)
        matched = {name: _matches(manager, name) for name in names}
        unknown = [name for name, found in matched.items() if not found]
        if unknown or not names:
            raise TaskError(
                "the harness has no such task",
                where="--tasks",
                found=", ".join(unknown) or "no name",
                fix="list all tasks with bamba-quant lm-eval ls tasks; your own are YAML files in --include-path",
            )
        opened = OpenedTasks(manager, tuple(dict.fromkeys(chain.from_iterable(matched.values()))))
        manager.load(list(opened.names))
    return opened


def _matches(manager: TaskManager, name: str) -> list[str]:
    return [name] if Path(name).is_file() else list(manager.match_tasks([name]))


def _given(words: Sequence[str], *options: str) -> bool:
    return any(word.startswith(options) for word in words)
