"""A stand-in for tuned rounding, which costs no forward pass: it changes some bytes of some tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.calibration.tune_options import TuneOptions
from bamba_quant.checkpoint import RawReader, open_checkpoint
from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.metadata.tune_record import Tuned, TuneRecord
from bamba_quant.writers.atomic import atomic_files
from bamba_quant.writers.stream import write_at

RECORD = TuneRecord(
    texts=("calib.txt", "more.txt"),
    sha256=("0" * 64, "ab" * 32),
    tokens=1000,
    steps=10,
    seed=3,
    held_out_kld_before=0.5,
    held_out_kld_after=0.25,
    codes=1000,
    codes_changed=100,
)
WORSE = replace(RECORD, held_out_kld_after=0.5, codes_changed=0)


class StandIn:
    """``tune`` that moves each row of quantized tensors, as packed, by one place; it notes what it was given."""

    def __init__(self, record: TuneRecord = RECORD, most: int = 3) -> None:
        self.record, self.most = record, most
        self.given: list[Path] = []
        self.tensors: dict[str, NDArray[Any]] = {}

    def __call__(self, quantized: Path) -> Tuned:
        self.given.append(quantized)
        checkpoint = open_checkpoint(quantized)
        self.tensors = {}
        for tensor in list(checkpoint.tensors.values()):
            if tensor.format.dtype is None and len(self.tensors) < self.most:
                name, raw = _stored(checkpoint.kind, tensor)
                self.tensors[name] = np.roll(raw, 1, axis=0)
        assert self.tensors
        return Tuned(self.tensors, self.record, dict.fromkeys(self.tensors, 1))


def _stored(kind: str, tensor: Any) -> tuple[str, NDArray[np.uint8]]:
    """The name and the bytes, in rows, of the tensor, or of that part of a packed one which holds codes."""
    part: StoredTensor = tensor if kind == "gguf" else tensor.codes.tensor
    raw = np.empty((part.shape[0], part.n_bytes // part.shape[0]), np.uint8)
    with RawReader() as reader:
        reader.read_into(part.file, part.offset, raw.reshape(-1))
    return part.name, raw


def tune_quickly(
    original: Path, quantized: Path, texts: Any, options: TuneOptions, tell: Any, note: Any, reading: Any
) -> Tuned:
    """In the place of ``tune``: a state is kept for a moment, and the stand-in's result returned."""
    assert options.state is not None
    with atomic_files([(options.state, 5)], overwrite=True) as (descriptor,):
        write_at(descriptor, 0, b"state")
    return StandIn()(quantized)


def names_left(place: Path) -> Sequence[str]:
    """What is in a directory."""
    return sorted(entry.name for entry in place.iterdir())
