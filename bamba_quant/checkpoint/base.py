"""One interface to what is on disk: named tensors, each a contiguous run of bytes in some file, read by rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.codecs import BlockCodec
from bamba_quant.codecs.arrays import U8
from bamba_quant.errors import CheckpointError
from bamba_quant.files.reading import open_regular
from bamba_quant.printable import brief_repr

Shape = tuple[int, ...]

_MOST_AXES = 32
_PIECE = 1 << 20  # weights that are unpacked at once


def are_counts(values: Sequence[Any]) -> bool:
    """Whether all are integers that a file's format and the system can count with."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def is_shape(values: Sequence[Any]) -> bool:
    """Whether ``values`` can be a tensor's lengths: numpy and torch multiply the others even where one is 0."""
    return len(values) <= _MOST_AXES and are_counts(values) and 8 * math.prod(n or 1 for n in values) < 2**63


@dataclass(frozen=True)
class Section:
    """Which rows of a larger tensor are this one's: of every ``period`` rows, ``length`` from ``start``."""

    start: int
    length: int
    period: int


def row_runs(section: Section | None, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows ``first`` to ``stop`` of a section as (row, row of the larger tensor, count); one run without a section."""
    if section is None:
        yield first, first, stop - first
        return
    while first < stop:
        matrix, row = divmod(first, section.length)
        count = min(stop - first, section.length - row)
        yield first, matrix * section.period + section.start + row, count
        first += count


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's location: ``shape`` in numpy's order (rows first), ``format`` of its bytes, byte range in ``file``.

    With ``section`` it is those rows of the tensor that begins at ``offset`` and is called ``name``.
    """

    name: str
    shape: Shape
    format: BlockCodec
    file: Path
    offset: int
    section: Section | None = None

    @property
    def columns(self) -> int:
        """Length of the last axis, along which blocks run."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as ``RawReader.read_rows`` gives it and ``format`` takes it."""
        return self.format.row_bytes(self.columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that reading it needs."""
        return (self.file,)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the checkpoint that it consists of: itself, or the matrices of a stack."""
        return (self,)

    @property
    def is_contiguous(self) -> bool:
        """Whether its rows are one run of bytes, from ``offset`` on."""
        return self.section is None

    def located(self, row: int) -> tuple[StoredTensor, int]:
        """The tensor of the file that holds this row, and the row's number there: for messages."""
        return self, row

    def fetch(self, reader: RawReader, row_bytes: int, first: int, buffer: U8) -> None:
        """Fill ``buffer`` with rows from ``first`` on, ``row_bytes`` each; errors as ``RawReader.read_into``'s."""
        reader.read_into(self.file, self.offset + first * row_bytes, buffer)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    ``kind`` is "huggingface", where ``metadata`` is the parsed config.json, or "gguf", where it is ``KeyValues``.
    ``files`` are those that hold tensors. Weights that a quantized checkpoint stores as several tensors are one in
    ``tensors``; ``unused`` names those that only its activations need, of which ``cache_scales`` are those of keys and
    values. ``notes`` tell the user what was tolerated in reading it. ``config_text`` is config.json as it was read.
    """

    path: Path
    kind: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...] = field(default=())
    unused: tuple[str, ...] = ()
    cache_scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config_text: bytes = field(default=b"", compare=False, repr=False)

    __repr__ = brief_repr

    @property
    def key_values(self) -> KeyValues:
        """``metadata`` of a GGUF, with its typed getters."""
        assert isinstance(self.metadata, KeyValues), "only a GGUF has key-values"
        return self.metadata

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())


class RawReader:
    """Reads byte ranges of any number of files, each opened once; safe to share between threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def open(self, file: Path, place: Path | None = None) -> int:
        """The descriptor of ``file``, a regular one, whose content is in ``place`` if that is given.

        Call it before threads share the reader.
        """
        if file not in self._descriptors:
            try:
                self._descriptors[file] = open_regular(place or file)[0]
            except OSError as error:
                raise CheckpointError(
                    "a file of the checkpoint cannot be opened", where=file, found=error.strerror
                ) from error
        return self._descriptors[file]

    def close(self, file: Path) -> None:
        """Close ``file``, if it is open; no thread may read it any more."""
        if (descriptor := self._descriptors.pop(file, None)) is not None:
            os.close(descriptor)

    def read_into(self, file: Path, offset: int, buffer: U8) -> None:
        """Fill ``buffer`` from ``offset``. Raises ``CheckpointError`` when that fails or the file ends first.

        Headers were checked against the size of their file, so a file that ends first has become shorter since.
        """
        descriptor = self.open(file)
        view = buffer.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    "a file of the checkpoint cannot be read",
                    where=f"{file}, byte {offset + done}",
                    found=error.strerror,
                ) from error
            if count == 0:
                raise CheckpointError(
                    "a file of the checkpoint changed while it was read: it ends earlier than when it was opened",
                    where=file,
                    found=f"{offset + done} bytes",
                    expected=f"at least {offset + len(view)} bytes",
                    fix="run the command again when nothing writes to the file, or fetch it again",
                )
            done += count

    def read_rows(self, tensor: StoredTensor, row_bytes: int, first: int, stop: int, buffer: U8) -> None:
        """Fill ``buffer`` with rows ``first`` to ``stop`` of ``tensor``, each ``row_bytes`` long. Raises likewise."""
        for row, position, count in row_runs(tensor.section, first, stop):
            start = (row - first) * row_bytes
            tensor.fetch(self, row_bytes, position, buffer[start : start + count * row_bytes])


def read_raw(tensor: StoredTensor) -> U8:
    """A whole tensor as ``format`` takes it, (rows, ``row_bytes``)."""
    raw = np.empty((tensor.rows, tensor.row_bytes), dtype=np.uint8)
    with RawReader() as reader:
        reader.read_rows(tensor, tensor.row_bytes, 0, tensor.rows, raw.reshape(-1))
    return raw


def read_tensor(tensor: StoredTensor) -> NDArray[Any]:
    """A whole tensor: in its own dtype when it stores plain numbers, else dequantized to float32."""
    if tensor.format.dtype is not None:
        return read_raw(tensor).view(tensor.format.dtype).reshape(tensor.shape)
    values = np.empty((tensor.rows, tensor.columns), np.float32)
    if not tensor.elements:
        return values.reshape(tensor.shape)
    step = max(1, _PIECE // max(1, tensor.columns))
    packed = np.empty((min(step, tensor.rows), tensor.row_bytes), np.uint8)
    with RawReader() as reader:
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            rows = packed[: stop - start]
            reader.read_rows(tensor, tensor.row_bytes, start, stop, rows.reshape(-1))
            values[start:stop] = tensor.format.dequantize(rows)
    return values.reshape(tensor.shape)


@dataclass(frozen=True)
class ReadOptions:
    """How to read a Hugging Face directory; GGUF files ignore all of it.

    ``ignore_config_keys`` are keys of config.json that change no logit, as the user states. ``ignore_adapter`` reads
    the base model where its directory has an adapter. ``strip_prefix`` is removed from every tensor name that begins
    with it.
    """

    ignore_config_keys: tuple[str, ...] = ()
    ignore_adapter: bool = False
    strip_prefix: str = ""
