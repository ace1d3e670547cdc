"""How an evaluation is done: every choice of the user's that changes a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bamba_quant.checkpoint.options import ReadOptions
from bamba_quant.evaluation.intervals import RESAMPLES


@dataclass(frozen=True)
class Options:
    """How to evaluate; ``chunks`` None is the whole text. ``floor_chunks`` and ``drift_chunks`` are watched."""

    ctx: int = 512
    chunks: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    seed: int = 0
    resamples: int = RESAMPLES
    noise_floor: str = "order"
    floor_chunks: int = 8
    drift_chunks: int = 2
    activations: str = "auto"
    tokenizer: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    save_base: Path | None = None
    overwrite: bool = False
