"""A stack of matrices that a checkpoint stores one by one, such as a layer's experts, read by rows as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bamba_quant.checkpoint.base import RawReader, Section, Shape, StoredTensor, row_runs
from bamba_quant.checkpoint.packed import PackedTensor
from bamba_quant.codecs.arrays import U8
from bamba_quant.errors import CheckpointError


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """A tensor (E, rows, columns) made of E ``matrices`` of one shape and format, which may lie in any files."""

    matrices: tuple[StoredTensor, ...] = field(kw_only=True)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk, of all matrices."""
        return sum(matrix.n_bytes for matrix in self.matrices)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for matrix in self.matrices for file in matrix.files))

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.matrices

    @property
    def is_contiguous(self) -> bool:
        return False

    def located(self, row: int) -> tuple[StoredTensor, int]:
        matrix, row = divmod(row, self.shape[-2])
        return self.matrices[matrix], row

    def fetch(self, reader: RawReader, row_bytes: int, first: int, buffer: U8) -> None:
        each = Section(0, self.shape[-2], self.shape[-2])
        for row, _, count in row_runs(each, first, first + len(buffer) // row_bytes):
            matrix, start = self.located(row)
            at = (row - first) * row_bytes
            reader.read_rows(matrix, row_bytes, start, start + count, buffer[at : at + count * row_bytes])


def stacked(name: str, matrices: Sequence[StoredTensor]) -> StackedTensor:
    """The stack ``name`` of ``matrices`` of one shape. Raises ``CheckpointError`` where their formats differ."""
    first = matrices[0]
    for matrix in matrices[1:]:
        if _format(matrix) != _format(first):
            raise CheckpointError(
                "matrices of one stack are stored in different formats",
                where=f"{matrix.file}, tensor {matrix.name}",
                found=matrix.format.name,
                expected=f"{first.format.name}, as {first.name}, with the same scales",
                fix="store all experts of a layer in one format",
            )
    shape = (len(matrices), *first.shape)
    return StackedTensor(name, shape, first.format, first.file, first.offset, matrices=tuple(matrices))


def section_of(tensor: StoredTensor, shape: Shape, section: Section) -> StoredTensor:
    """These rows of ``tensor``, or of each matrix of a stack, as a tensor of ``shape``."""
    if not isinstance(tensor, StackedTensor):
        return replace(tensor, shape=shape, section=section)
    matrices = tuple(replace(matrix, shape=shape[1:], section=section) for matrix in tensor.matrices)
    return replace(tensor, shape=shape, matrices=matrices)


def packed_like(tensor: StoredTensor) -> PackedTensor | None:
    """The packed tensor that decodes rows of ``tensor``: itself or a matrix of a stack, None for another format."""
    first = tensor.matrices[0] if isinstance(tensor, StackedTensor) else tensor
    return first if isinstance(first, PackedTensor) else None


def _format(tensor: StoredTensor) -> tuple[object, ...]:
    """What rows of one format have in common."""
    if not isinstance(tensor, PackedTensor):
        return (tensor.format.name, tensor.row_bytes)
    parts = tuple((part.width, part.rows, part.tensor.format.name) for part in tensor.scale_tensors)
    rounding = tensor.activations and replace(tensor.activations, scale=0.0)  # of each matrix its own
    return (tensor.format.name, tensor.row_bytes, tensor.dequantizer, rounding, parts)
