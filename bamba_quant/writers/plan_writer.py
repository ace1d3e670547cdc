"""Executes any plan: streams its rows through every core into files that appear whole or not at all.

The bytes depend neither on the number of threads, nor on the size of a chunk, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint import RawReader
from bamba_quant.checkpoint.gguf_file import insert_fingerprint
from bamba_quant.codecs.base import Encode, Shared
from bamba_quant.errors import OutputError, PlanError
from bamba_quant.planning.plan import Plan
from bamba_quant.writers import stream
from bamba_quant.writers.atomic import atomic_files
from bamba_quant.writers.checksum import Checksum
from bamba_quant.writers.directory import reserve
from bamba_quant.writers.fingerprint import fingerprint
from bamba_quant.writers.journal import Journal
from bamba_quant.writers.matrices import Measurement, encode
from bamba_quant.writers.names import flush_directory
from bamba_quant.writers.resumable import finished, resumable_directory
from bamba_quant.writers.resumable_file import resumable_file
from bamba_quant.writers.shards import Group, ShardStream, by_shard, whole
from bamba_quant.writers.stream import OutputFile, Streams
from bamba_quant.writers.tasks import Progress, Task, default_threads, run_tasks

# Called with the directory that is being written, the descriptors of its files by name, and its journal.
Finish = Callable[[Path, Mapping[str, int], Journal], None]
Chunk = tuple[int, int, int]  # number of the row in the plan, first row, row after the last


def write_plan(
    plan: Plan,
    output: Path,
    *,
    threads: int | None = None,
    compiled: bool = True,
    overwrite: bool = False,
    replace_input: bool = False,
    resume: bool = False,
    stream_from_hub: bool = False,
    inputs: Collection[Path] = (),
    progress: Progress = lambda n_bytes: None,
    finish: Finish | None = None,
    finished_by: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Write ``plan`` to the file or directory ``output``; return the files, weights first.

    With ``compiled=False`` numpy quantizes GGUF types, which is slower and gives the same bytes. ``replace_input``
    allows ``overwrite`` to replace a file that the plan reads; ``inputs`` are other files that must stay.
    ``progress`` is called with input bytes as they are processed.

    A directory that is interrupted leaves what ``resume`` needs beside ``output``, and so does one GGUF file that is
    streamed from the Hub: a run with ``resume`` continues where an interrupted one of the same plan stopped, if there
    was one. ``finish`` may change a directory's files before it appears, in ways that ``finished_by`` describes for
    ``resume``.

    With ``stream_from_hub`` files that are on the Hub are fetched one by one, beside ``output``, and removed when their
    last row is done.

    Raises ``OutputError`` for the output's sake, ``CheckpointError`` and ``FormatError`` for a weight's; then nothing
    has appeared.
    """
    if plan.config_only:
        raise PlanError(
            "the model has only a config.json, so there are no weights to write",
            where=plan.checkpoint.path,
            fix="fetch the weights",
        )
    paths = plan.paths(output)
    running: dict[str, Any] = {"threads": threads, "compiled": compiled, "progress": progress}
    if stream_from_hub:
        running["shards"] = output.with_name(f"{output.name}.hub")
    if plan.container == "gguf":
        kept = {*inputs, *(() if replace_input else plan.inputs)}
        if stream_from_hub and len(paths) == 1:
            begun = {**fingerprint(plan), "search of scales": plan.refine}
            asked: dict[str, Any] = {"inputs": kept, "overwrite": overwrite, "resume": resume}
            with (
                resumable_file(output, paths[output], begun, **asked) as (
                    descriptor,
                    journal,
                ),
                journal.listing(partial(_flush, [descriptor])),
            ):
                fill(plan, [descriptor], journal=journal, **running)
            return tuple(paths)
        if resume:
            raise OutputError(
                "only one GGUF file that is streamed from the Hub can be resumed",
                where=output,
                fix="leave out --resume",
            )
        with atomic_files(list(paths.items()), overwrite=overwrite, inputs=kept) as descriptors:
            fill(plan, descriptors, **running)
        return tuple(paths)
    begun = {**fingerprint(plan), **(finished_by or {})}
    if resume and finished(output, begun, plan.inputs):
        progress(plan.work_bytes)
        return tuple(paths)
    with (
        resumable_directory(
            output,
            begun,
            inputs={*inputs, *plan.inputs},
            overwrite=overwrite,
            resume=resume,
            n_bytes=sum(paths.values()),
        ) as (partial_directory, journal),
        ExitStack() as opened,
    ):
        descriptors = _open_files(plan, partial_directory, bool(journal.done), opened)
        with journal.listing(partial(_flush, descriptors)):
            fill(plan, descriptors, journal=journal, **running)
        if finish is not None:
            finish(partial_directory, dict(zip(plan.sizes, descriptors, strict=True)), journal)
        _flush(descriptors)  # small files, too, and where nothing was left to list
    return tuple(paths)


def fill(
    plan: Plan,
    descriptors: Sequence[int],
    *,
    threads: int | None = None,
    compiled: bool = True,
    journal: Journal | None = None,
    progress: Progress = lambda n_bytes: None,
    shards: Path | None = None,
) -> None:
    """Write the files of ``plan``, weights first, to open ``descriptors``; arguments and errors as above.

    Chunks that ``journal`` lists are not written again. Files on the Hub are fetched to ``shards``, if it is given.
    """
    is_set = plan.container == "gguf" and len(plan.shards) > 1
    files = [
        OutputFile(descriptor, len(shard.header), Checksum(shard.n_bytes) if is_set else None)
        for shard, descriptor in zip(plan.shards, descriptors, strict=False)
    ]
    with RawReader() as reader:
        run = _Run(plan, Streams(reader, files), journal, compiled, threads or default_threads(), progress)
        groups = by_shard(plan) if shards else whole(plan)
        with ShardStream(shards, list(filter(run.is_pending, groups)), reader) as fetched:
            for group in groups:
                with fetched.ready(group):
                    run.execute(group)
    headers = _marked(plan, files) if is_set else [shard.header for shard in plan.shards]
    for descriptor, content in zip(descriptors, [*headers, *plan.files.values()], strict=True):
        stream.write_at(descriptor, 0, content)
    for shard, descriptor in zip(plan.shards, descriptors, strict=False):
        for part in (part for part in shard.parts if part.name in plan.constants):
            stream.write_at(descriptor, len(shard.header) + part.offset, plan.constants[part.name])


def _marked(plan: Plan, files: Sequence[OutputFile]) -> list[bytes]:
    """The shards' headers with the mark of their set, a digest of all headers and weights.

    It depends on nothing else, so the same conversion gives the same bytes anywhere, and shards with the same mark
    are interchangeable.
    """
    digest = hashlib.sha256()
    for shard, file in zip(plan.shards, files, strict=True):
        digest.update(shard.header)
        assert file.checksum is not None
        digest.update(file.checksum.value.to_bytes(4, "little"))
    return [insert_fingerprint(shard.header, digest.hexdigest()) for shard in plan.shards]


def _flush(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.fsync(descriptor)


def _open_files(plan: Plan, partial_directory: Path, resuming: bool, opened: ExitStack) -> list[int]:
    """Descriptors of the directory's files; new ones have their blocks reserved unless the run is ``resuming``."""
    descriptors: list[int] = []
    for file, n_bytes in plan.paths(partial_directory).items():
        file.parent.mkdir(exist_ok=True)
        if resuming and (not file.is_file() or file.stat().st_size != n_bytes):
            raise OutputError(
                "the unfinished files of an interrupted run were damaged and have been removed",
                where=file,
                found=f"{file.stat().st_size} bytes" if file.exists() else "no such file",
                expected=f"{n_bytes} bytes",
                fix="start again",
            )
        descriptor = os.open(file, os.O_RDWR) if resuming else reserve(file, n_bytes)
        opened.callback(os.close, descriptor)
        descriptors.append(descriptor)
    for directory in {file.parent for file in plan.paths(partial_directory)}:
        flush_directory(directory)  # a chunk that the journal lists must not lack its file
    return descriptors


@dataclass
class _Run:
    """One execution. The journal counts rows in the plan's order."""

    plan: Plan
    streams: Streams
    journal: Journal | None
    compiled: bool
    threads: int
    progress: Progress

    def is_pending(self, group: Group) -> bool:
        """Whether a group has rows that are not done, or only copies to be checked."""
        return not group.rows or any(True for _ in self._chunks(group.rows))

    def execute(self, group: Group) -> None:
        for skipped in group.skipped:
            stream.check_equal(skipped, self.streams.reader)
        rows = self.plan.rows
        units: dict[str, list[int]] = {}
        for number in group.rows:
            if rows[number].method is not None:
                units.setdefault(rows[number].unit, []).append(number)
        before: Iterator[Task] = iter(())
        for unit in units.values():
            method = rows[unit[0]].method
            assert method is not None
            encode_rows = method.compiled() if method.compiled else method.encode
            if method.measure is None:
                before = chain(before, self._encodings(unit, encode_rows, None))
                continue
            if not any(True for _ in self._chunks(unit)):
                self.progress(2 * sum(rows[number].source.n_bytes for number in unit))
                continue
            measured = Measurement(method)
            # A unit is measured while the one before it is encoded.
            run_tasks(chain(before, self._measurements(unit, measured)), self.threads, self.progress)
            before = self._encodings(unit, encode_rows, measured.shared())
        run_tasks(chain(before, self._conversions(group.rows)), self.threads, self.progress)

    def _chunks(self, numbers: Sequence[int], skipped: Progress = lambda n_bytes: None) -> Iterator[Chunk]:
        """The chunks of rows that the journal does not list; ``skipped`` is called with the bytes of the others."""
        done = self.journal.done if self.journal is not None else frozenset()
        for number in numbers:
            for start, stop in stream.chunks(self.plan.rows[number]):
                if (number, start) in done:
                    skipped(stream.input_bytes(self.plan.rows[number], start, stop))
                else:
                    yield number, start, stop

    def _finished(self, chunk: Chunk) -> int:
        """Add ``chunk`` to the journal; its input bytes."""
        number, start, stop = chunk
        if self.journal is not None:
            self.journal.add((number, start))
        return stream.input_bytes(self.plan.rows[number], start, stop)

    def _measurements(self, unit: Sequence[int], measured: Measurement) -> Iterator[Task]:
        method = measured.method
        measure = method.compiled_measure() if method.compiled_measure else method.measure
        assert measure is not None

        def task(number: int, start: int, stop: int) -> int:
            row = self.plan.rows[number]
            measured.measure(self.streams, row, start, stop, measure)
            return stream.input_bytes(row, start, stop)

        for number in unit:
            for start, stop in stream.chunks(self.plan.rows[number]):
                yield partial(task, number, start, stop)

    def _encodings(self, unit: Sequence[int], encode_rows: Encode, shared: Shared) -> Iterator[Task]:
        def task(chunk: Chunk) -> int:
            number, start, stop = chunk
            encode(self.streams, self.plan.rows[number], start, stop, encode_rows, shared)
            return self._finished(chunk)

        for chunk in self._chunks(unit, self.progress):
            yield partial(task, chunk)

    def _conversions(self, numbers: Sequence[int]) -> Iterator[Task]:
        rows = self.plan.rows
        by_format = stream.quantizers(self.plan.others, self.plan.refine, self.compiled)

        def task(chunk: Chunk) -> int:
            number, start, stop = chunk
            row = rows[number]
            if stream.is_copied(row):
                self.streams.copy(row, start, stop)
            else:
                self.streams.convert(row, start, stop, by_format[row.format.name])
            return self._finished(chunk)

        others = [number for number in numbers if rows[number].method is None]
        for chunk in self._chunks(others, self.progress):
            yield partial(task, chunk)
