"""Streams rows of tensors from input files to output files, by chunks.

No step holds more than a chunk per thread. A weight that is NaN or infinite is an error that names its tensor. The
bytes do not depend on the number of threads or the size of a chunk.
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint import RawReader, Section, StoredTensor, row_runs
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import Quantize
from bamba_quant.codecs.floats import to_float32
from bamba_quant.errors import CheckpointError, FormatError
from bamba_quant.planning.model import SkippedTensor
from bamba_quant.planning.plan import PlanRow
from bamba_quant.writers.checksum import Checksum

CHUNK_BYTES = 4 << 20  # of the input; larger chunks were no faster, smaller ones cost more system calls
_CACHED_BYTES = (
    1 << 18
)  # a piece that stays in a core's cache; system calls with larger ones take longer a byte
_COPIED_CHUNKS = 4  # chunks that are copied at once
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class OutputFile:
    """An open file of weights, whose header takes ``header_bytes``; ``checksum`` counts what is written."""

    descriptor: int
    header_bytes: int
    checksum: Checksum | None = None

    def copy(self, offset: int, source: int, source_offset: int, n_bytes: int) -> bool:
        """Let the system copy bytes of the open file ``source``; False where it cannot copy all of them.

        ``checksum`` does not count them.
        """
        done, start = 0, self.header_bytes + offset
        while done < n_bytes:
            try:
                count = os.copy_file_range(
                    source, self.descriptor, n_bytes - done, source_offset + done, start + done
                )
            except AttributeError:  # not Linux
                return False
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    return False
                raise
            if count == 0:  # the source is shorter, or its file system cannot copy
                return False
            done += count
        return True

    def write(self, offset: int, data: U8) -> None:
        """Write ``data`` at ``offset`` bytes from the end of the header."""
        write_at(self.descriptor, self.header_bytes + offset, data)
        if self.checksum is not None:
            self.checksum.add(self.header_bytes + offset, data)


@dataclass(frozen=True)
class Streams:
    """What chunks are read from and written to; threads share it. ``files`` are in the order of the shards."""

    reader: RawReader
    files: Sequence[OutputFile]
    _buffers: threading.local = field(default_factory=threading.local)

    def read(self, row: PlanRow, start: int, stop: int) -> U8:
        """The bytes of rows ``start`` to ``stop``, flat and finite, in a buffer that this thread's next read reuses."""
        row_bytes = source_row_bytes(row)
        raw = self._buffer((stop - start) * row_bytes)
        self.reader.read_rows(row.source, row_bytes, start, stop, raw)
        if row.source.format.dtype is not None:
            check_finite(row.source, raw.view(row.source.format.dtype), start * row.matrix[1])
        return raw

    def copy(self, row: PlanRow, start: int, stop: int) -> None:
        """Check rows ``start`` to ``stop`` and copy their bytes, which ``is_copied`` says are those of the output."""
        (part,) = row.parts
        file, source, row_bytes = self.files[part.shard], row.source, source_row_bytes(row)
        begin, end, dtype = start * row_bytes, stop * row_bytes, source.format.dtype
        copied = file.checksum is None and file.copy(
            part.offset + begin, self.reader.open(source.file), source.offset + begin, end - begin
        )
        if copied and dtype is None:
            return  # packed blocks are checked where they are unpacked
        for offset in range(begin, end, _CACHED_BYTES):
            piece = self._buffer(min(_CACHED_BYTES, end - offset))
            self.reader.read_into(source.file, source.offset + offset, piece)
            if dtype is not None:
                check_finite(source, piece.view(dtype), offset // dtype.itemsize)
            if not copied:
                file.write(part.offset + offset, piece)

    def _buffer(self, n_bytes: int) -> U8:
        """Memory of this thread."""
        buffer: U8 | None = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._buffers.buffer = np.empty(max(n_bytes, CHUNK_BYTES), np.uint8)
        return buffer[:n_bytes]

    def convert(self, row: PlanRow, start: int, stop: int, quantize: Quantize) -> None:
        """Read rows ``start`` to ``stop``, change their format and write them."""
        data = convert_rows(row, quantize, self.read(row, start, stop), start)
        written = len(data) // (stop - start)
        (part,) = row.parts
        for first, position, count in row_runs(row.section, start, stop):
            at = (first - start) * written
            self.files[part.shard].write(part.offset + position * written, data[at : at + count * written])


def chunks(row: PlanRow) -> Iterator[tuple[int, int]]:
    """The chunks of a row of the plan, cut where its transform or scheme allows: first row, row after the last."""
    rows, columns = row.matrix
    unit = row.scheme.row_multiple if row.method is not None else row.transform.unit
    # What is packed in the input becomes float32 on its way, of many times its size.
    packed = row.source.format.dtype is None and not keeps_format(row)
    row_bytes = 4 * columns if packed else source_row_bytes(row)
    chunk_bytes = _COPIED_CHUNKS * CHUNK_BYTES if is_copied(row) else CHUNK_BYTES
    step = max(1, chunk_bytes // (unit * row_bytes)) * unit
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def input_bytes(row: PlanRow, start: int, stop: int) -> int:
    """The share of rows ``start`` to ``stop`` in the input's bytes; all shares add up to the tensor's bytes."""
    rows, n_bytes = row.matrix[0], row.source.n_bytes
    return n_bytes * stop // rows - n_bytes * start // rows


def source_row_bytes(row: PlanRow) -> int:
    return row.source.format.row_bytes(row.matrix[1])


def quantizers(rows: Sequence[PlanRow], refine: bool = False, compiled: bool = True) -> dict[str, Quantize]:
    """By codec name: numpy for plain numbers, the ``compiled`` version where there is one for other codecs.

    ``refine`` asks for the method of that name, of codecs that have it.
    """
    chosen: dict[str, Quantize] = {row.format.name: row.format.quantize for row in rows}
    for codec in {row.format.name: row.format for row in rows if not keeps_format(row)}.values():
        if codec.dtype is None:
            method = "refine" if refine and codec.has_method("refine") else None
            chosen[codec.name] = codec.quantizer(method, compiled)
    return chosen


def keeps_format(row: PlanRow) -> bool:
    """Whether a tensor's bytes are only moved."""
    return row.transform.moves_rows_only and row.codec == row.source.format


def is_copied(row: PlanRow) -> bool:
    """Whether the bytes of the input are those of the output, one contiguous run of each."""
    order = row.transform.row_order
    whole = row.section is None and row.source.is_contiguous
    return keeps_format(row) and order is None and whole


def convert_rows(row: PlanRow, quantize: Quantize, raw: U8, first_row: int) -> U8:
    """Bytes of whole source rows to bytes of the output: transform, change format.

    ``raw`` is flat and finite; ``quantize`` has the row's format; ``first_row`` is for messages and for the choice of
    the importance of a matrix in a stack. Rows that keep their format are moved as packed bytes, so nothing is lost.
    """
    source = row.source.format
    packed = raw.reshape(-1, source_row_bytes(row))
    if keeps_format(row):
        return np.ascontiguousarray(row.transform.apply(packed, first_row)).reshape(-1)
    if source.dtype is not None:
        numbers = row.transform.apply(to_float32(packed.view(source.dtype)), first_row)
    else:
        unpacked = source.dequantize(packed)
        _check_computed(row.source, unpacked, first_row)
        numbers = row.transform.apply(unpacked, first_row)
    if not row.transform.moves_rows_only:
        _check_computed(row.source, numbers, first_row)
    _check_range(row, numbers)
    if row.importance is None or row.importance.ndim == 1:
        return quantize(numbers, row.importance).reshape(-1)
    # Each matrix of a stack has an importance of its own.
    cuts = Section(0, row.shape[-2], row.shape[-2])
    runs = row_runs(cuts, first_row, first_row + len(numbers))
    packed_runs = [
        quantize(numbers[start - first_row : start - first_row + count], row.importance[start // cuts.length])
        for start, _, count in runs
    ]
    return np.concatenate(packed_runs).reshape(-1)


def check_equal(skipped: SkippedTensor, reader: RawReader) -> None:
    """Raise ``CheckpointError`` when a tensor that is skipped as a copy of another holds other bytes."""
    source, original = skipped.source, skipped.equal_to
    if original is None:
        return
    differs = CheckpointError(
        "a tensor that the configuration calls a copy differs from the original",
        where=f"{source.file}, tensor {source.name}",
        found=f"other values than {original.name}",
        expected=skipped.reason,
        fix="set tie_word_embeddings to false in config.json if the model was trained untied",
    )
    if original.format != source.format or original.shape != source.shape:
        raise differs
    step = max(1, CHUNK_BYTES // source.row_bytes)
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        pair = np.empty((2, (stop - start) * source.row_bytes), dtype=np.uint8)
        reader.read_rows(source, source.row_bytes, start, stop, pair[0])
        reader.read_rows(original, original.row_bytes, start, stop, pair[1])
        if not np.array_equal(pair[0], pair[1]):
            raise differs


# Bits of the smallest non-finite magnitude of each dtype: exponent all ones.
_NON_FINITE = {"f32": (np.int32, 0x7F800000), "f16": (np.int16, 0x7C00), "bf16": (np.int16, 0x7F80)}


def check_finite(tensor: StoredTensor, values: NDArray[Any], first: int) -> None:
    """Raise ``CheckpointError`` naming tensor and position when a value is NaN or infinite.

    ``first`` is the number of the first value in the tensor.

    Read as integers, a positive non-finite is at least the bits of +inf; a negative one, read without sign, at
    least those of -inf. Two maxima in cache cost less than a pass that builds a mask.
    """
    signed, infinity = _NON_FINITE[tensor.format.name]
    unsigned = np.dtype(signed).str.replace("i", "u")
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    if (
        values.view(signed).max(initial=0) < infinity
        and values.view(unsigned).max(initial=0) < infinity | sign
    ):
        return
    position = int(np.flatnonzero(~np.isfinite(to_float32(values)))[0])
    row, column = divmod(first + position, tensor.columns) if len(tensor.shape) > 1 else (0, first + position)
    tensor, row = tensor.located(row)
    raise CheckpointError(
        "a weight is not a finite number",
        where=f"{tensor.file}, tensor {tensor.name}",
        found=f"{float(values.reshape(-1)[position])} at row {row}, column {column}",
        expected="finite values",
        fix="the checkpoint is damaged or the training diverged: fetch or repair it",
    )


def _check_computed(tensor: StoredTensor, values: F32, first_row: int) -> None:
    """``check_finite`` for float32 (rows, columns) that packed or transformed weights became."""
    if math.isfinite(values.max(initial=0)) and math.isfinite(values.min(initial=0)):
        return
    row, column = np.argwhere(~np.isfinite(values))[0].tolist()
    tensor, row = tensor.located(first_row + row)
    raise CheckpointError(
        "a dequantized weight is not a finite number",
        where=f"{tensor.file}, tensor {tensor.name}",
        found=f"{float(values[row, column])} at row {row}, column {column}",
        expected="finite values",
        fix="the file is damaged: fetch or make it again",
    )


def _check_range(row: PlanRow, numbers: F32) -> None:
    largest = float(max(numbers.max(initial=0), -numbers.min(initial=0)))
    if largest > row.format.max_abs:
        raise FormatError(
            f"a weight is too large for {row.format.name}",
            where=f"{row.source.file}, tensor {row.source.name}",
            found=f"magnitude {largest:g}",
            expected=f"at most {row.format.max_abs:g}",
            fix="choose bf16 or f32",
        )


def write_at(descriptor: int, offset: int, data: U8 | bytes) -> None:
    """All of ``data`` at ``offset``. Raises ``OSError`` when the system refuses, a full disk among the reasons."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _CACHED_BYTES], offset + done)
