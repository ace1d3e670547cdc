"""Finds the models and texts that stand beside the repository, or says why a test cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "BAMBA_QUANT_SHARED"
# The variable's value on machines of which it is known that they have no such directory.
NONE = "none"


def shared_directory() -> Path | None:
    """The directory named by ``BAMBA_QUANT_SHARED``, else ``shared`` beside the repository, else none."""
    named = os.environ.get(VARIABLE)
    directory = Path(named) if named else Path(__file__).resolve().parents[3] / "shared"
    return directory if directory.is_dir() else None


def shared(path: str) -> Path:
    """``path`` inside the shared directory, such as ``models/bamba-mini``.

    Where it is absent the calling test is skipped with the reason; in CI (the variable ``CI`` is set) it
    fails, because a suite that skips its oracles proves nothing, unless the variable says ``NONE``.
    """
    directory = shared_directory()
    found = directory / path if directory else None
    if found is not None and found.exists():
        return found
    reason = f"{path} is not there: name the directory that holds it in {VARIABLE} (looked in {directory})"
    if os.environ.get("CI") and os.environ.get(VARIABLE) != NONE:
        pytest.fail(reason)
    pytest.skip(reason)
