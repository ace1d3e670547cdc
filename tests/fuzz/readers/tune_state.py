"""The reader of the state of an interrupted tuning."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from bamba_quant.calibration.tune_state import read_state, write_state
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.safetensors import safetensors
from tests.fuzz.registry import Case, reader
from tests.fuzz.tree import Tree

_ARRAYS = {
    "latent:a:codes": torch.linspace(-1, 1, 48).reshape(6, 8),
    "first:a:codes": torch.zeros(6, 8),
    "best:a:codes": torch.arange(48, dtype=torch.int8).reshape(6, 8),
}
_BELONGS = {"sha256": ["ab" * 32], "steps": None, "seed": 0, "train": ["codes"]}


@cache
def _state() -> Tree:
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "x.tuning"
        write_state(file, _ARRAYS, _BELONGS, {"step": 3, "best_kld": 0.25})
        return {"x.tuning": file.read_bytes()}


@reader("tune_state", seeds=lambda: [_state()], mutate=files({"x.tuning": safetensors}), weight=3)
def tune_state(case: Case) -> None:
    shapes = {name: tuple(array.shape) for name, array in _ARRAYS.items()}
    read_state(case.path / "x.tuning", _BELONGS, shapes)
