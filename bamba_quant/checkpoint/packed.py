"""A weight that several stored tensors make up, read by rows: codes, the scales of its rows, zeros.

A row comes as the bytes of its codes followed by float32 scales and zeros, whatever shape and order these have on
disk, so that everything that reads tensors by rows reads these too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint.base import RawReader, StoredTensor, row_runs
from bamba_quant.checkpoint.dequantize import Dequantizer, TorchaoTiles
from bamba_quant.codecs import BlockCodec
from bamba_quant.codecs.arrays import F32, U8

if TYPE_CHECKING:
    import torch


Strategy = Literal["token", "tensor", "group", "nvfp4", "mxfp4"]


@dataclass(frozen=True)
class Activations:
    """e4m3 under scales found as activations come: one a token, one a tensor, or one for ``group`` columns of a token.

    Or e2m1 as "nvfp4" (``scale`` is its global scale) and "mxfp4" have it, in groups of so many columns. With another
    strategy a ``scale`` that is not 0 is that of every tensor. ``unknown`` describes any other rounding, which nothing
    here can do; the rest then has no meaning.
    """

    strategy: Strategy = "token"
    group: int = 0
    unknown: str = ""
    scale: float = 0.0

    def __str__(self) -> str:
        if self.strategy.endswith("fp4"):
            return self.unknown or self.strategy
        return self.unknown or f"e4m3 by {self.group or self.strategy}" + (", static" if self.scale else "")


@dataclass(frozen=True)
class ScaleTensor:
    """Numbers beside the codes: one index along ``axis`` of ``tensor`` covers ``rows`` rows of the weight.

    ``rows`` 0 stands for all of them. With ``unpack`` an index holds the numbers of its rows one by one:
    ``unpack(words (n, groups), count)`` gives float32 (count, groups). A last axis behind ``axis`` 1 holds several
    numbers, of which ``item`` is this one. ``pack`` undoes ``unpack`` where something may write these numbers;
    ``beside`` is a tensor that ``unpack`` has read.
    """

    tensor: StoredTensor
    rows: int = 1
    axis: int = 0
    item: int = 0
    unpack: Callable[[NDArray[Any], int], F32] | None = None
    pack: Callable[[F32], NDArray[Any]] | None = None
    beside: StoredTensor | None = None

    @property
    def width(self) -> int:
        """Numbers that belong to a row."""
        if self.rows == 0:
            return self.tensor.elements
        if len(self.tensor.shape) < 2:
            return 1
        return self.tensor.shape[1 - self.axis]

    def read(self, reader: RawReader, first: int, stop: int) -> F32:
        """float32 (stop - first, width): the numbers of those rows of the weight."""
        if self.rows == 0:
            return np.broadcast_to(self._whole(reader), (stop - first, self.width))
        low, high = first // self.rows, -(-stop // self.rows)
        if self.axis == 1:
            found = self._columns(reader, low, high)
        else:
            found = self._numbers(reader, low * self.width, (high - low) * self.width).reshape(-1, self.width)
        skipped = first - low * self.rows
        if self.unpack is not None:
            return self.unpack(found, stop - low * self.rows)[skipped:]
        each = np.repeat(found, self.rows, axis=0) if self.rows > 1 else found
        return each[skipped : skipped + stop - first].astype(np.float32)

    def _whole(self, reader: RawReader) -> NDArray[Any]:
        return self._numbers(reader, 0, self.tensor.elements).astype(np.float32)

    def _columns(self, reader: RawReader, low: int, high: int) -> NDArray[Any]:
        across, items = self.tensor.shape[1], math.prod(self.tensor.shape[2:])
        runs = [
            self._numbers(reader, (i * across + low) * items, (high - low) * items)[self.item :: items]
            for i in range(self.width)
        ]
        return np.stack(runs, axis=1)

    def _numbers(self, reader: RawReader, start: int, count: int) -> NDArray[Any]:
        dtype = self.tensor.format.dtype
        assert dtype is not None
        raw = np.empty(count * dtype.itemsize, np.uint8)
        reader.read_into(self.tensor.file, self.tensor.offset + start * dtype.itemsize, raw)
        return raw.view(dtype)


@dataclass(frozen=True)
class CodeTensor:
    """The codes of a weight: one index along the first axis of ``tensor`` covers ``rows`` rows.

    ``order`` brings the bytes of some indices into the order of rows, (n·rows, ``row_bytes``).
    """

    tensor: StoredTensor
    row_bytes: int
    rows: int = 1
    order: TorchaoTiles | None = None

    def read(self, reader: RawReader, first: int, stop: int) -> U8:
        """uint8 (stop - first, ``row_bytes``): the codes of those rows."""
        raw, skipped = self.stored(reader, first, stop)
        return (raw if self.order is None else self.order.rows(raw))[skipped : skipped + stop - first]

    def stored(self, reader: RawReader, first: int, stop: int) -> tuple[U8, int]:
        """The indices that those rows lie in, uint8 (n, bytes), and how many rows before them these hold."""
        low, high = first // self.rows, -(-stop // self.rows)
        length = self.tensor.n_bytes // self.tensor.shape[0]
        raw = np.empty((high - low, length), np.uint8)
        reader.read_into(self.tensor.file, self.tensor.offset + low * length, raw.reshape(-1))
        return raw, first - low * self.rows


@dataclass(frozen=True)
class RowBlock:
    """``count`` neighbouring rows as they are stored: ``codes`` hold ``skipped`` rows before the first of them.

    ``scale`` and ``zero`` are float32 (count, numbers), ``zero`` without numbers where a weight has none.
    """

    count: int
    codes: U8
    skipped: int
    scale: F32
    zero: F32


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A weight of ``shape`` (rows, columns) made of ``codes``, a ``scale`` and perhaps a ``zero``, by ``dequantizer``.

    ``activations`` is how the checkpoint has what enters the matrix rounded, None where it is not.
    """

    dequantizer: Dequantizer = field(kw_only=True)

    codes: CodeTensor = field(kw_only=True)
    scale: ScaleTensor = field(kw_only=True)
    zero: ScaleTensor | None = field(default=None, kw_only=True)
    activations: Activations | None = field(default=None, kw_only=True)

    @property
    def scale_tensors(self) -> tuple[ScaleTensor, ...]:
        return (self.scale,) if self.zero is None else (self.scale, self.zero)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk, of all its parts."""
        return sum(tensor.n_bytes for tensor in self._tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(tensor.file for tensor in self._tensors)

    @property
    def is_contiguous(self) -> bool:
        return False

    @property
    def _tensors(self) -> tuple[StoredTensor, ...]:
        """Each stored tensor once: a scale and a zero may lie in one."""
        parts = self.scale_tensors
        beside = (part.beside for part in parts if part.beside is not None)
        tensors = (self.codes.tensor, *(part.tensor for part in parts), *beside)
        return tuple({tensor.name: tensor for tensor in tensors}.values())

    def row_blocks(self, reader: RawReader, first: int, stop: int, most: int) -> Iterator[RowBlock]:
        """Rows ``first`` to ``stop`` in turn, ``most`` at a time; errors as ``RawReader.read_into``'s."""
        for _, place, count in row_runs(self.section, first, stop):
            for low in range(place, place + count, most):
                high = min(low + most, place + count)
                codes, skipped = self.codes.stored(reader, low, high)
                scale = self.scale.read(reader, low, high)
                zero = scale[:, :0] if self.zero is None else self.zero.read(reader, low, high)
                yield RowBlock(high - low, codes, skipped, scale, zero)

    def scales(self) -> F32:
        """All scales, (rows, numbers of a row); errors as ``RawReader.read_into``'s."""
        with RawReader() as reader:
            runs = row_runs(self.section, 0, self.rows)
            return np.concatenate([self.scale.read(reader, place, place + count) for _, place, count in runs])

    def decode_on(self, block: RowBlock, device: torch.device) -> torch.Tensor:
        """The rows of a block, float32 (count, columns), computed on the device: ``format.dequantize``'s values."""
        import torch

        codes, scale, zero = (
            torch.from_numpy(np.require(part, requirements=["C", "W"])).to(device)
            for part in (block.codes, block.scale, block.zero)
        )
        if self.codes.order is not None:
            codes = self.codes.order.rows_on(codes)
        wanted = codes[block.skipped : block.skipped + block.count]
        return self.dequantizer.values_on(wanted, scale, zero)

    def rows_on(self, raw: torch.Tensor) -> torch.Tensor:
        """``format.dequantize`` of rows uint8 (r, ``row_bytes``) where they lie, float32 (r, columns)."""
        import torch

        codes, scales = self.codes.row_bytes, self.scale.width
        numbers = raw[:, codes:].contiguous().view(torch.float32)
        return self.dequantizer.values_on(
            raw[:, :codes].contiguous(), numbers[:, :scales], numbers[:, scales:]
        )

    def fetch(self, reader: RawReader, row_bytes: int, first: int, buffer: U8) -> None:
        rows = buffer.reshape(-1, row_bytes)
        at = self.codes.row_bytes
        rows[:, :at] = self.codes.read(reader, first, first + len(rows))
        for part in self.scale_tensors:
            numbers = np.ascontiguousarray(part.read(reader, first, first + len(rows)))
            rows[:, at : at + 4 * part.width] = numbers.view(np.uint8)
            at += 4 * part.width


def packed_tensor(
    name: str,
    described: str,
    shape: tuple[int, int],
    dequantizer: Dequantizer,
    *,
    codes: CodeTensor,
    scale: ScaleTensor,
    zero: ScaleTensor | None = None,
    activations: Activations | None = None,
) -> PackedTensor:
    """The weight ``name`` of its parts; ``described`` is what users see as its type."""
    code_bytes, scales, zeros = codes.row_bytes, scale.width, 0 if zero is None else zero.width
    row_bytes = code_bytes + 4 * (scales + zeros)

    def dequantize(raw: U8) -> F32:
        numbers = np.ascontiguousarray(raw[:, code_bytes:]).view(np.float32)
        return dequantizer.values(
            np.ascontiguousarray(raw[:, :code_bytes]), numbers[:, :scales], numbers[:, scales:]
        )

    codec = BlockCodec(
        name=described,
        ggml_type=-1,
        block_size=shape[1],
        block_bytes=row_bytes,
        dequantize=dequantize,
        fields=dequantizer.fields(code_bytes, scales),
        packed=dequantizer.packed(code_bytes, scales),
    )
    tensor = codes.tensor
    return PackedTensor(
        name, shape, codec, tensor.file, tensor.offset,
        dequantizer=dequantizer, codes=codes, scale=scale, zero=zero, activations=activations,
    )  # fmt: skip
