"""Weights as the reference names and shapes them, from any checkpoint, one tensor at a time and only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bamba_reference.config import Config
from numpy.typing import NDArray

from bamba_quant.architectures import TensorRule, architecture_of, architecture_of_gguf
from bamba_quant.checkpoint import Checkpoint, StoredTensor, open_checkpoint, read_tensor
from bamba_quant.errors import PlanError, listed
from bamba_quant.plan import match_tensors


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
            mapped = np.memmap(tensor.file, tensor.format.dtype, "r", tensor.offset, tensor.elements)
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


def load_model(path: str | Path, *, ignore_config_keys: tuple[str, ...] = ()) -> LoadedModel:
    """The model at ``path``, a Hugging Face directory or a GGUF file: headers now, weights when they are read.

    Raises a ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "huggingface":
        architecture = architecture_of(checkpoint.metadata)
        config = Config.from_hf(checkpoint.metadata, ignore=ignore_config_keys)
        pairs = match_tensors(checkpoint, architecture.tensors(config))
        stored = {rule.hf: (tensor, rule) for tensor, rule in pairs if not rule.left_out}
        return LoadedModel(checkpoint, config, LazyWeights(stored, inverted=False))
    architecture = architecture_of_gguf(checkpoint.metadata)
    config = architecture.config_of_gguf(checkpoint.metadata, checkpoint.tensors)
    rules = {rule.gguf: rule for rule in architecture.tensors(config) if rule.gguf is not None}
    _check_gguf_tensors(checkpoint, rules)
    stored = {rule.hf: (checkpoint.tensors[name], rule) for name, rule in rules.items()}
    return LoadedModel(checkpoint, config, LazyWeights(stored, inverted=True))


def _check_gguf_tensors(checkpoint: Checkpoint, rules: Mapping[str, TensorRule]) -> None:
    missing = sorted(rules.keys() - checkpoint.tensors.keys())
    unknown = sorted(checkpoint.tensors.keys() - rules.keys())
    if missing or unknown:
        raise PlanError(
            "the file's tensors are not those its key-values imply",
            where=checkpoint.path,
            found="; ".join(
                f"{what} {listed(names)}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
        )
    for name, rule in rules.items():
        # Writers differ in whether they count leading axes of one row.
        if _squeezed(checkpoint.tensors[name].shape) != _squeezed(rule.gguf_shape):
            raise PlanError(
                "a tensor has another shape than the file's key-values imply",
                where=f"{checkpoint.path}, tensor {name}",
                found=checkpoint.tensors[name].shape,
                expected=rule.gguf_shape,
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
