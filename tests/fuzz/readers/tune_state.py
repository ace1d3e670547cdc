"""The reader of the state of an interrupted tuning."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from bamba_quant.calibration.tune_state import TuneState, read_state, write_state
from tests.fuzz.mutations.blind import files
from tests.fuzz.mutations.safetensors import safetensors
from tests.fuzz.registry import Case, reader
from tests.fuzz.tree import Tree

_ARRAYS = {
    "latent:a:codes": np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8),
    "first:a:codes": np.zeros((6, 8), np.float32),
    "best:a:codes": np.arange(48, dtype=np.int8).reshape(6, 8),
}
_BELONGS = {"sha256": ["ab" * 32], "steps": None, "seed": 0, "train": ["codes"]}


@cache
def _state() -> Tree:
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "x.tuning"
        write_state(file, TuneState(_ARRAYS, _BELONGS, {"step": 3, "best_kld": 0.25}))
        return {"x.tuning": file.read_bytes()}


@reader("tune_state", seeds=lambda: [_state()], mutate=files({"x.tuning": safetensors}), weight=3)
def tune_state(case: Case) -> None:
    shapes = {name: array.shape for name, array in _ARRAYS.items()}
    read_state(case.path / "x.tuning", _BELONGS, shapes)
