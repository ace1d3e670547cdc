"""Errors of tasks; those of the harness become this project's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from yaml import YAMLError

from bamba_quant.errors import BambaQuantError

# What the harness, its templates of prompts and its data sets raise for a task or an argument.
_ERRORS = (
    *(AssertionError, ImportError, LookupError, OSError, TypeError, ValueError),
    *(DatasetsError, TemplateError, YAMLError),
)


class TaskError(BambaQuantError):
    """A task, or an argument of the harness, that cannot be run."""


def positive(name: str, value: int | str, most: int | None = None) -> Any:
    """A number of at least 1; None for "auto". Raises ``TaskError`` for anything else."""
    if name == "batch_size" and str(value).startswith("auto"):
        return most
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        expected = "a number from 1" + (', or "auto"' if name == "batch_size" else "")
        raise TaskError(f"{name} cannot be used", where="--model_args", found=value, expected=expected)
    return value


@contextmanager
def harness_errors() -> Iterator[None]:
    """Raise the harness' errors as ``TaskError``; those of this project pass."""
    try:
        yield
    except BambaQuantError:
        raise
    except _ERRORS as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        raise TaskError(
            "lm-evaluation-harness stopped with an error",
            found="\n".join(f"{type(each).__name__}: {each}" for each in chain),
            fix="correct the task or its options; the harness reads data sets from the Hugging Face Hub unless the "
            "task names local files",
        ) from error
