"""Exporting in a test, and comparing the directory with the one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bamba_quant.planning.export import plan_export
from bamba_quant.writers import write_plan
from tests.support.directories import tensors


def exported(file: Path, target: Path, **options: Any) -> Path:
    """The directory ``target``, exported from a GGUF file; ``options`` are those of planning and of writing."""
    writing = {
        key: options.pop(key) for key in ("threads", "overwrite", "resume", "progress") if key in options
    }
    write_plan(plan_export(file, **options), target, **writing)
    return target


def assert_same_checkpoint(found: Path, expected: Path, but: str = "\0") -> None:
    """Names, dtypes, shapes and bits are the same, except of names that end in ``but``."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        if not name.endswith(but):
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
