"""Weights as the reference names and shapes them, from any checkpoint, one tensor at a time and only when asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint import Checkpoint, RawReader, ReadOptions, StoredTensor, read_tensor
from bamba_quant.codecs.base import U8
from bamba_quant.codecs.decoding import decode
from bamba_quant.families import TensorRule
from bamba_quant.planning.model import open_model
from bamba_reference.config import Config


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run: its configuration, its weights and the checkpoint they come from."""

    checkpoint: Checkpoint
    config: Config
    weights: LazyWeights
    architecture: str


@dataclass(frozen=True)
class WeightInfo:
    """What a tensor of a model is, without reading it; ``format`` is what its weights are stored in."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    format: str
    n_bytes: int


class Timings:
    """Adds up the seconds spent ``reading`` bytes, ``decoding`` them to numbers and ``compiling`` kernels.

    What is compiled while something else is done counts as compiling alone.
    """

    def __init__(self) -> None:
        self.reading = 0.0
        self.decoding = 0.0
        self.compiling = 0.0

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        started, compiled = time.perf_counter(), self.compiling
        try:
            yield
        finally:
            elsewhere = self.compiling - compiled
            setattr(self, what, getattr(self, what) + time.perf_counter() - started - elsewhere)


class LazyWeights(Mapping[str, NDArray[Any]]):
    """Reading a name loads that tensor: in its own dtype where it is stored plainly, else as float32.

    Nothing is kept, and nothing is mapped: a file that shrinks while it is read is an error.
    """

    def __init__(self, stored: Mapping[str, tuple[StoredTensor, TensorRule]], inverted: bool) -> None:
        self._stored = stored
        self._inverted = inverted

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.rows(name)

    def rows(
        self, name: str, start: int = 0, stop: int | None = None, timings: Timings | None = None
    ) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a tensor along its first axis, in memory: plain numbers in their dtype,
        others as float32.

        Only these rows are read, but for vectors, which are read whole. ``timings`` is told the seconds it took.
        """
        tensor, rule, moved = self.stored(name)
        timings = timings or Timings()
        stop = rule.shape[0] if stop is None else stop
        if len(rule.shape) == 1:
            with timings.spent("reading"):
                values = read_tensor(tensor)
            if moved:
                values = rule.transform.invert(values.reshape(-1, 1))
            return values.reshape(rule.shape)[start:stop]
        raw, first = self.raw(name, start, stop, timings)
        with timings.spent("decoding"):
            plain = tensor.format.dtype
            values = decode(tensor.format, raw) if plain is None else raw.view(plain)
            if moved:
                values = rule.transform.invert(values)
        return values.reshape(-1, *rule.shape[1:])[start - first : stop - first]

    def raw(self, name: str, start: int, stop: int, timings: Timings) -> tuple[U8, int]:
        """The bytes (rows, ``row_bytes``) that hold indices ``start`` to ``stop`` of the first axis, and the index
        they begin with: the one before ``start`` at which a transform that is to be undone can be cut.
        """
        tensor = self.stored(name)[0]
        first, last, each = self.span(name, start, stop)
        raw = np.empty(((last - first) * each, tensor.row_bytes), np.uint8)
        with timings.spent("reading"), RawReader() as reader:
            reader.read_rows(tensor, tensor.row_bytes, first * each, last * each, raw.reshape(-1))
        return raw, first

    def span(self, name: str, start: int, stop: int) -> tuple[int, int, int]:
        """Between which indices ``raw`` reads for ``start`` to ``stop``, and how many stored rows are behind each."""
        tensor, rule, moved = self.stored(name)
        together = rule.transform.rows if moved else 1
        each = tensor.rows // rule.shape[0]  # a stack of matrices has several rows behind an index
        return start // together * together, -(-stop // together) * together, each

    def info(self, name: str) -> WeightInfo:
        """What the tensor is, from the headers."""
        tensor, rule = self._stored[name]
        return WeightInfo(name, rule.role, rule.layer, rule.shape, tensor.format.name, tensor.n_bytes)

    def stored(self, name: str) -> tuple[StoredTensor, TensorRule, bool]:
        """Where a tensor lies, its rule, and whether that rule's transform is to be undone."""
        tensor, rule = self._stored[name]
        return tensor, rule, self._inverted and bool(rule.transform.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def load_model(path: str | Path, *, reading: ReadOptions = ReadOptions()) -> LoadedModel:
    """The model at ``path``, a Hugging Face directory or a GGUF file: headers now, weights when they are read.

    Raises a ``BambaQuantError`` for an architecture that is not supported and for tensors that do not fit their
    configuration.
    """
    source = open_model(path, reading=reading)
    stored = {rule.name: (tensor, rule) for tensor, rule in source.pairs if not rule.skipped}
    weights = LazyWeights(stored, inverted=source.checkpoint.kind == "gguf")
    return LoadedModel(source.checkpoint, source.config, weights, source.architecture.name)
