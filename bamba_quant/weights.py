"""Weights as the reference names and shapes them, from any checkpoint, one tensor at a time and only when asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.architectures import TensorRule
from bamba_quant.checkpoint import Checkpoint, StoredTensor, read_tensor
from bamba_quant.source import open_source
from bamba_reference.config import Config


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run: its configuration, its weights and the checkpoint they come from."""

    checkpoint: Checkpoint
    config: Config
    weights: Mapping[str, NDArray[Any]]


class LazyWeights(Mapping[str, NDArray[Any]]):
    """Reading a name loads that tensor: in its own dtype where it is stored plainly, else as float32.

    Tensors stored as the reference wants them are mapped from the file, so that reading a few rows of one touches
    only these. Nothing is kept.
    """

    def __init__(self, stored: Mapping[str, tuple[StoredTensor, TensorRule]], inverted: bool) -> None:
        self._stored = stored
        self._inverted = inverted

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor, rule = self._stored[name]
        moved = self._inverted and rule.transform.name
        if tensor.format.dtype is not None and not moved:
            section = tensor.section
            stacked = 1 if section is None else section.period // section.length
            mapped: NDArray[Any] = np.memmap(
                tensor.file, tensor.format.dtype, "r", tensor.offset, stacked * tensor.elements
            )
            if section is not None:
                whole = mapped.reshape(-1, section.period, tensor.columns)
                mapped = whole[:, section.start : section.start + section.length]
            return mapped.reshape(rule.shape)
        values = read_tensor(tensor)
        if not moved:
            return values.reshape(rule.shape)
        rows = values.reshape(-1, 1) if values.ndim == 1 else values.reshape(-1, values.shape[-1])
        return rule.transform.invert(rows).reshape(rule.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def load_model(path: str | Path, *, ignore_config_keys: Collection[str] = ()) -> LoadedModel:
    """The model at ``path``, a Hugging Face directory or a GGUF file: headers now, weights when they are read.

    Raises a ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    source = open_source(path, ignore_config_keys=ignore_config_keys)
    stored = {rule.name: (tensor, rule) for tensor, rule in source.pairs if not rule.left_out}
    weights = LazyWeights(stored, inverted=source.checkpoint.kind == "gguf")
    return LoadedModel(source.checkpoint, source.config, weights)
