"""Streams tensors by chunks of rows from input files to output files, every core at work, memory bounded.

No step holds more than a chunk per thread, a weight that is NaN or infinite ends the run with its tensor's name,
and the bytes do not depend on the number of threads or the size of a chunk.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint import PackedTensor, RawReader, Section, StoredTensor, row_runs
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import Quantize
from bamba_quant.codecs.floats import to_float32
from bamba_quant.errors import CheckpointError, FormatError
from bamba_quant.planning.model import SkippedTensor
from bamba_quant.planning.plan import PlanRow
from bamba_quant.writers.checksum import Checksum
from bamba_quant.writers.tasks import Progress, Task, run_tasks

CHUNK_BYTES = 4 << 20  # of the input; larger chunks were no faster, smaller ones cost more system calls


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a plan's row, through ``quantize``, to its tensor at byte ``offset``.

    ``checksum``, if any, is told what is written.
    """

    row: PlanRow
    quantize: Quantize
    start: int
    stop: int
    descriptor: int
    offset: int
    checksum: Checksum | None = None


def quantizers(rows: Sequence[PlanRow], refine: bool = False, compiled: bool = True) -> dict[str, Quantize]:
    """By codec name: numpy for plain numbers, the ``compiled`` version where there is one for other codecs.

    ``refine`` asks for the method of that name, of codecs that have it.
    """
    chosen: dict[str, Quantize] = {row.format.name: row.format.quantize for row in rows}
    for codec in {row.format.name: row.format for row in rows if not copies(row)}.values():
        if codec.dtype is None:
            method = "refine" if refine and codec.has_method("refine") else None
            chosen[codec.name] = codec.quantizer(method, compiled)
    return chosen


def copies(row: PlanRow) -> bool:
    """Whether a tensor's packed bytes are only moved."""
    return row.transform.moves_rows_only and row.format == row.source.format


def chunks_of(
    row: PlanRow, quantize: Quantize, descriptor: int, base: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Cut a row of the plan where its transform allows; ``base`` is where its tensor begins in the output."""
    rows, columns = row.matrix
    unit = row.transform.unit
    # Codes beside their scales become float32 on their way, of many times their size.
    packed = isinstance(row.source, PackedTensor)
    step = max(1, chunk_bytes // (unit * (4 * columns if packed else _source_row_bytes(row)))) * unit
    for start in range(0, rows, step):
        yield Chunk(row, quantize, start, min(start + step, rows), descriptor, base)


def run_chunks(chunks: Iterable[Chunk], reader: RawReader, threads: int, progress: Progress) -> None:
    """Execute ``chunks`` on ``threads`` threads; ``progress`` is told the input bytes of each finished chunk.

    Raises the first error any chunk met, once no thread is at work any more.
    """
    scratch = threading.local()

    def task(chunk: Chunk) -> Task:
        for file in chunk.row.source.files:
            reader.open(file)
        return partial(run_chunk, chunk, reader, scratch)

    run_tasks(map(task, chunks), threads, progress)


def check_equal(skipped: SkippedTensor, reader: RawReader) -> None:
    """Raise ``CheckpointError`` when a tensor that is left out as a copy of another holds other bytes."""
    source, twin = skipped.source, skipped.equal_to
    if twin is None:
        return
    differs = CheckpointError(
        "a tensor that the configuration calls a copy is none",
        where=f"{source.file}, tensor {source.name}",
        found=f"other values than {twin.name}",
        expected=skipped.reason,
        fix="set tie_word_embeddings to false in config.json if the model was trained untied",
    )
    if twin.format != source.format or twin.shape != source.shape:
        raise differs
    step = max(1, CHUNK_BYTES // source.row_bytes)
    for start in range(0, source.rows, step):
        stop = min(start + step, source.rows)
        pair = np.empty((2, (stop - start) * source.row_bytes), dtype=np.uint8)
        reader.read_rows(source, source.row_bytes, start, stop, pair[0])
        reader.read_rows(twin, twin.row_bytes, start, stop, pair[1])
        if not np.array_equal(pair[0], pair[1]):
            raise differs


def convert_rows(row: PlanRow, quantize: Quantize, raw: U8, first_row: int) -> U8:
    """Bytes of whole source rows to bytes of the output: check, transform, change format.

    ``raw`` is flat; ``quantize`` is the row's codec's; ``first_row`` is only for messages. Pure, and the
    same for any cut of the tensor. Rows that keep their format are moved as packed bytes, so nothing is lost.
    """
    source = row.source.format
    if source.dtype is not None:
        check_finite(row.source, raw.view(source.dtype), first_row)
    packed = raw.reshape(-1, _source_row_bytes(row))
    if copies(row):
        return np.ascontiguousarray(row.transform.apply(packed, first_row)).reshape(-1)
    if source.dtype is not None:
        numbers = row.transform.apply(to_float32(packed.view(source.dtype)), first_row)
    else:
        unpacked = source.dequantize(packed)
        check_unpacked(row.source, unpacked, first_row)
        numbers = row.transform.apply(unpacked, first_row)
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


# Bits of the smallest non-finite magnitude of each dtype: exponent all ones.
_NON_FINITE = {"f32": (np.int32, 0x7F800000), "f16": (np.int16, 0x7C00), "bf16": (np.int16, 0x7F80)}


def check_finite(tensor: StoredTensor, values: NDArray[Any], first_row: int) -> None:
    """Raise ``CheckpointError`` naming tensor and place when a value is NaN or infinite.

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
    place = int(np.flatnonzero(~np.isfinite(to_float32(values)))[0])
    row, column = divmod(place, tensor.columns) if len(tensor.shape) > 1 else (0, place)
    raise CheckpointError(
        "a weight is not a finite number",
        where=f"{tensor.file}, tensor {tensor.name}",
        found=f"{float(values.reshape(-1)[place])} at row {first_row + row}, column {column}",
        expected="finite values",
        fix="the checkpoint is damaged or the training diverged: fetch or repair it",
    )


def check_unpacked(tensor: StoredTensor, values: F32, first_row: int) -> None:
    """``check_finite`` for float32 (rows, columns) that packed weights became."""
    if math.isfinite(values.max(initial=0)) and math.isfinite(values.min(initial=0)):
        return
    row, column = np.argwhere(~np.isfinite(values))[0].tolist()
    raise CheckpointError(
        "a weight is not a finite number once it is unpacked",
        where=f"{tensor.file}, tensor {tensor.name}",
        found=f"{float(values[row, column])} at row {first_row + row}, column {column}",
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


def _source_row_bytes(row: PlanRow) -> int:
    return row.source.format.row_bytes(row.matrix[1])


def _share(source: StoredTensor, start: int, stop: int, rows: int) -> int:
    """The input bytes that rows ``start`` to ``stop`` of ``rows`` stand for; all shares add up to the tensor's."""
    return source.n_bytes * stop // rows - source.n_bytes * start // rows


def run_chunk(chunk: Chunk, reader: RawReader, scratch: threading.local) -> int:
    """Read a chunk, change its format and write it; return the bytes read. ``scratch`` is its thread's own."""
    row_bytes = _source_row_bytes(chunk.row)
    length = (chunk.stop - chunk.start) * row_bytes
    buffer: U8 | None = getattr(scratch, "buffer", None)
    if buffer is None or len(buffer) < length:
        buffer = scratch.buffer = np.empty(max(length, CHUNK_BYTES), dtype=np.uint8)
    raw = buffer[:length]
    source = chunk.row.source
    reader.read_rows(source, row_bytes, chunk.start, chunk.stop, raw)
    data = convert_rows(chunk.row, chunk.quantize, raw, chunk.start)
    written = len(data) // (chunk.stop - chunk.start)
    for row, place, count in row_runs(chunk.row.section, chunk.start, chunk.stop):
        first = (row - chunk.start) * written
        piece, offset = data[first : first + count * written], chunk.offset + place * written
        write_at(chunk.descriptor, offset, piece)
        if chunk.checksum is not None:
            chunk.checksum.add(offset, piece)
    return _share(source, chunk.start, chunk.stop, chunk.row.matrix[0])


def write_at(descriptor: int, offset: int, data: U8 | bytes) -> None:
    """All of ``data`` at ``offset``. Raises ``OSError`` when the system refuses, a full disk among the reasons."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
