"""Executes the plan of a quantized directory: rows stream through every core, and an interrupted run can go on.

The bytes depend neither on the number of threads, nor on the size of a chunk, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant import __version__
from bamba_quant.checkpoint import RawReader
from bamba_quant.codecs.arrays import F32, U8, Array
from bamba_quant.codecs.base import DTYPES, Encode, Measure, Method, Part, Shared
from bamba_quant.codecs.floats import to_float32
from bamba_quant.errors import FormatError, OutputError, PlanError
from bamba_quant.planning.quantize import Matrix, Quantization
from bamba_quant.writers.directory import reserve
from bamba_quant.writers.gguf import default_threads
from bamba_quant.writers.journal import Journal
from bamba_quant.writers.names import flush_directory
from bamba_quant.writers.resumable import finished, resumable_directory
from bamba_quant.writers.safetensors import row_chunks
from bamba_quant.writers.shards import Entry
from bamba_quant.writers.stream import Chunk, check_equal, check_finite, run_chunk, write_at
from bamba_quant.writers.tasks import Progress, Task, run_tasks

CHUNK_BYTES = 4 << 20  # of the input

# Is told the directory that is being made, the descriptors of its files by name, and its journal.
Finish = Callable[[Path, Mapping[str, int], Journal], None]


def write_quantized(
    plan: Quantization,
    directory: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda n_bytes: None,
    finish: Finish | None = None,
    finished_by: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Write ``plan`` into ``directory``; return the files, weights first.

    With ``resume`` a run goes on where an interrupted one of the same plan stopped, if there was one.  ``progress``
    is told input bytes as they are done with. ``finish`` may change the files before the directory appears, in ways
    that ``finished_by`` describes for ``resume``. Raises ``OutputError`` for the output's sake, ``CheckpointError`` and
    ``FormatError`` for a weight's; then nothing has appeared. An interrupt leaves what ``resume`` needs beside
    ``directory``.
    """
    if plan.source.config_only:
        raise PlanError("there are no weights to quantize", where=plan.source.checkpoint.path)
    n_bytes = sum(plan.sizes.values())
    begun = {**fingerprint(plan), **(finished_by or {})}
    files = tuple(directory / name for name in plan.sizes)
    if resume and finished(directory, begun, plan.inputs):
        progress(plan.work_bytes)
        return files
    with (
        resumable_directory(
            directory,
            begun,
            inputs=plan.inputs,
            overwrite=overwrite,
            resume=resume,
            n_bytes=n_bytes,
        ) as (place, journal),
        RawReader() as reader,
        ExitStack() as opened,
    ):
        for skipped in plan.skipped:
            check_equal(skipped, reader)
        descriptors = _open_files(plan, place, bool(journal.done), opened)
        run = _Run(plan, descriptors, reader, journal, threads or default_threads(), progress)
        with journal.listing(partial(_flush, descriptors)):
            run.execute()
        if finish is not None:
            finish(place, dict(zip(plan.sizes, descriptors, strict=True)), journal)
        _flush(descriptors)  # small files, too, where nothing was left to list
    return files


def fingerprint(plan: Quantization) -> dict[str, Any]:
    """What an interrupted run must have in common with the one that goes on, by what a user would call it."""
    digest = hashlib.sha256()
    for shard in plan.shards:
        digest.update(shard.header)
    small = hashlib.sha256(repr(sorted(plan.files.items())).encode())
    weights = hashlib.sha256()
    for matrix in plan.matrices:
        weights.update(b"" if matrix.importance is None else matrix.importance.tobytes())
    inputs = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in plan.inputs}
    return {
        "version": __version__,
        "scheme": plan.scheme.name,
        "method": plan.method.name,
        "layout": digest.hexdigest(),
        "configuration or card": small.hexdigest(),
        "importance matrix": weights.hexdigest(),
        "chunk size": CHUNK_BYTES,
        "input": inputs,
    }


def _flush(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.fsync(descriptor)


def _open_files(plan: Quantization, place: Path, going_on: bool, opened: ExitStack) -> list[int]:
    """Descriptors of the shards, then of the small files; everything but weights is written, again when going on."""
    descriptors: list[int] = []
    for name, n_bytes in plan.sizes.items():
        file = place / name
        file.parent.mkdir(exist_ok=True)
        if going_on and (not file.is_file() or file.stat().st_size != n_bytes):
            raise OutputError(
                "the work of an interrupted run is damaged, and was removed",
                where=file,
                found=f"{file.stat().st_size} bytes" if file.exists() else "no such file",
                expected=f"{n_bytes} bytes",
                fix="begin anew",
            )
        descriptor = os.open(file, os.O_RDWR) if going_on else reserve(file, n_bytes)
        opened.callback(os.close, descriptor)
        descriptors.append(descriptor)
    for directory in {(place / name).parent for name in plan.sizes}:
        flush_directory(directory)  # a chunk that the journal lists must not lack its file
    for descriptor, content in zip(
        descriptors, [*(shard.header for shard in plan.shards), *plan.files.values()], strict=True
    ):
        write_at(descriptor, 0, content)
    return descriptors


@dataclass
class _Measured:
    """What the chunks of a unit measured, joined."""

    method: Method
    value: Array | None = None
    joining: threading.Lock = field(default_factory=threading.Lock)

    def add(self, found: Array) -> None:
        assert self.method.combine is not None
        with self.joining:
            self.value = found if self.value is None else self.method.combine(self.value, found)

    def shared(self) -> Shared:
        assert self.method.share is not None and self.value is not None
        return self.method.share(self.value)


@dataclass
class _Run:
    """One execution. The journal numbers tensors as here: matrices first, in the plan's order."""

    plan: Quantization
    descriptors: Sequence[int]
    reader: RawReader
    journal: Journal
    threads: int
    progress: Progress
    scratch: threading.local = field(default_factory=threading.local)

    def execute(self) -> None:
        method, matrices = self.plan.method, self.plan.matrices
        for source in self.plan.sources:
            for file in source.files:
                self.reader.open(file)
        encode = method.compiled() if method.compiled else method.encode
        if method.measure is None:
            self._run(self._encodings(range(len(matrices)), encode, None), self._rows())
            return
        measure = method.compiled_measure() if method.compiled_measure else method.measure
        units: dict[str, list[int]] = {}
        for number, matrix in enumerate(matrices):
            units.setdefault(matrix.unit, []).append(number)
        before: Iterator[Task] = iter(())
        for unit in units.values():
            if all(key in self.journal.done for number in unit for key, _ in self._cuts(number)):
                self.progress(2 * sum(matrices[number].source.n_bytes for number in unit))
                continue
            measured = _Measured(method)
            # A unit is measured while the one before it is encoded.
            self._run(before, self._measurements(unit, measure, measured))
            before = self._encodings(unit, encode, measured.shared())
        self._run(before, self._rows())

    def _run(self, *tasks: Iterator[Task]) -> None:
        run_tasks(chain(*tasks), self.threads, self.progress)

    def _cuts(self, number: int) -> Iterator[tuple[tuple[int, int], int]]:
        """The chunks of a matrix: their keys in the journal, and the rows they end before."""
        matrix, scheme = self.plan.matrices[number], self.plan.scheme
        rows, columns = matrix.shape
        unit = scheme.row_multiple
        step = max(1, CHUNK_BYTES // (unit * matrix.source.format.row_bytes(columns))) * unit
        for start in range(0, rows, step):
            yield (number, start), min(start + step, rows)

    def _measurements(self, unit: Sequence[int], measure: Measure, measured: _Measured) -> Iterator[Task]:
        def task(matrix: Matrix, start: int, stop: int) -> int:
            x, n_bytes = self._read(matrix, start, stop)
            measured.add(measure(x, matrix.importance))
            return n_bytes

        for number in unit:
            for (_, start), stop in self._cuts(number):
                yield partial(task, self.plan.matrices[number], start, stop)

    def _encodings(self, numbers: Iterable[int], encode: Encode, shared: Shared) -> Iterator[Task]:
        scheme = self.plan.scheme

        def task(matrix: Matrix, key: tuple[int, int], stop: int) -> int:
            start = key[1]
            x, n_bytes = self._read(matrix, start, stop)
            try:
                parts = dict(encode(x, matrix.importance, shared))
            except FormatError as error:
                where = f"{matrix.source.file}, tensor {matrix.source.name}"
                raise FormatError(
                    error.what, where=where, found=error.found, expected=error.expected, fix=error.fix
                ) from None
            if start == 0:
                parts |= scheme.whole(*matrix.shape, shared)
            for part, entry in zip(scheme.parts(*matrix.shape), matrix.entries, strict=True):
                if part.suffix in parts:
                    self._write(part, entry, parts[part.suffix], start, stop)
            self.journal.add(key)
            return n_bytes

        for number in numbers:
            matrix = self.plan.matrices[number]
            for key, stop in self._cuts(number):
                if key in self.journal.done:
                    self.progress((stop - key[1]) * matrix.source.format.row_bytes(matrix.shape[1]))
                else:
                    yield partial(task, matrix, key, stop)

    def _rows(self) -> Iterator[Task]:
        def task(chunk: Chunk, key: tuple[int, int]) -> int:
            n_bytes = run_chunk(chunk, self.reader, self.scratch)
            self.journal.add(key)
            return n_bytes

        for number, row in enumerate(self.plan.rows, len(self.plan.matrices)):
            header_bytes = len(self.plan.shards[row.shard].header)
            for chunk in row_chunks(row, self.descriptors[row.shard], header_bytes):
                key = (number, chunk.start)
                if key in self.journal.done:
                    self.progress((chunk.stop - chunk.start) * row.source.format.row_bytes(row.matrix[1]))
                else:
                    yield partial(task, chunk, key)

    def _read(self, matrix: Matrix, start: int, stop: int) -> tuple[F32, int]:
        """Rows of a matrix, checked, as float32, and how many bytes they take in the input."""
        source = matrix.source
        row_bytes = source.format.row_bytes(source.columns)
        length = (stop - start) * row_bytes
        buffer: U8 | None = getattr(self.scratch, "matrix", None)
        if buffer is None or len(buffer) < length:
            buffer = self.scratch.matrix = np.empty(max(length, CHUNK_BYTES), np.uint8)
        raw = buffer[:length]
        self.reader.read_rows(source, row_bytes, start, stop, raw)
        values = raw.view(source.format.dtype)
        check_finite(source, values, start)
        return to_float32(values).reshape(-1, source.columns), length

    def _write(self, part: Part, entry: Entry, values: Array, start: int, stop: int) -> None:
        """Put a part of rows ``start`` to ``stop`` where the plan has it."""
        first, end = part.span(start, stop) if part.rows else (0, entry.shape[part.axis])
        shape = (*entry.shape[: part.axis], end - first, *entry.shape[part.axis + 1 :])
        if values.shape != shape or values.dtype != DTYPES[entry.dtype]:
            raise ValueError(
                f"{entry.name}: {values.dtype} of shape {values.shape}, {entry.dtype} {shape} planned"
            )
        base = len(self.plan.shards[entry.shard].header) + entry.offset
        pieces = math.prod(entry.shape[: part.axis])
        whole = entry.n_bytes // pieces
        one = whole // entry.shape[part.axis]
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(pieces, -1)
        for number, piece in enumerate(raw):
            write_at(self.descriptors[entry.shard], base + number * whole + first * one, piece)
