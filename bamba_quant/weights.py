"""Weights as the reference names and shapes them, from any checkpoint, one tensor at a time and only when asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.architectures import TensorRule
from bamba_quant.checkpoint import Checkpoint, StoredTensor, read_raw, read_tensor
from bamba_quant.source import open_source
from bamba_reference.config import Config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run: its configuration, its weights and the checkpoint they come from."""

    checkpoint: Checkpoint
    config: Config
    weights: LazyWeights

    def on(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, Any]:
        """The weights for a device: on a GPU dequantized there, to ``dtype``, elsewhere as they are."""
        return DeviceWeights(self.weights, device, dtype) if device.type == "cuda" else self.weights


class LazyWeights(Mapping[str, NDArray[Any]]):
    """Reading a name loads that tensor: in its own dtype where it is stored plainly, else as float32.

    Tensors stored as the reference wants them are mapped from the file, so that reading a few rows of one touches
    only these. Nothing is kept.
    """

    def __init__(self, stored: Mapping[str, tuple[StoredTensor, TensorRule]], inverted: bool) -> None:
        self._stored = stored
        self._inverted = inverted

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor, rule, moved = self.stored(name)
        if tensor.format.dtype is not None and not moved:
            mapped = np.memmap(tensor.file, tensor.format.dtype, "r", tensor.offset, tensor.elements)
            return mapped.reshape(rule.shape)
        values = read_tensor(tensor)
        if not moved:
            return values.reshape(rule.shape)
        rows = values.reshape(-1, 1) if values.ndim == 1 else values.reshape(-1, values.shape[-1])
        return rule.transform.invert(rows).reshape(rule.shape)

    def stored(self, name: str) -> tuple[StoredTensor, TensorRule, bool]:
        """Where a tensor lies, its rule, and whether that rule's transform is to be undone."""
        tensor, rule = self._stored[name]
        return tensor, rule, self._inverted and bool(rule.transform.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class DeviceWeights(Mapping[str, Any]):
    """``LazyWeights`` read on a GPU: blocks go there as they are stored, and weights of ``dtype`` come out; tensors
    stored plainly keep their own.

    What a GPU does not read (formats that are only read, and changes of single values) is read on the CPU, to the
    same values: it is a few vectors of a model, or a file of such a format.
    """

    def __init__(self, weights: LazyWeights, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def __getitem__(self, name: str) -> Any:
        import torch

        from bamba_quant.formats.cuda.decoding import decode, decodes

        tensor, rule, moved = self._weights.stored(name)
        if not decodes(tensor.format) or len(tensor.shape) < 2 or (moved and not rule.transform.moves):
            return self._weights[name]
        raw = read_raw(tensor).reshape(tensor.rows, -1)
        if moved:
            raw = np.ascontiguousarray(rule.transform.invert(raw))
        plain = tensor.format.dtype
        dtype = self._dtype if plain is None else getattr(torch, plain.name)
        return decode(tensor.format, torch.from_numpy(raw).to(self._device), dtype).view(rule.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def load_model(path: str | Path, *, ignore_config_keys: Collection[str] = ()) -> LoadedModel:
    """The model at ``path``, a Hugging Face directory or a GGUF file: headers now, weights when they are read.

    Raises a ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    source = open_source(path, ignore_config_keys=ignore_config_keys)
    stored = {rule.hf: (tensor, rule) for tensor, rule in source.pairs if not rule.left_out}
    weights = LazyWeights(stored, inverted=source.checkpoint.kind == "gguf")
    return LoadedModel(source.checkpoint, source.config, weights)
