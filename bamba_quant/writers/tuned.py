"""Writes files whose rounding is tuned: first without, beside their place; then tuned; then whole, into their place."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.errors import PlanError
from bamba_quant.families.transforms import IDENTITY
from bamba_quant.files.json_file import insert_key
from bamba_quant.metadata.tune_record import CONFIG_KEY, Tuned
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import Quantization
from bamba_quant.planning.small_files import CARD, CONFIG
from bamba_quant.writers.atomic import check_space, check_target, temporary_file
from bamba_quant.writers.gguf import fill, layout, write_gguf
from bamba_quant.writers.journal import Fingerprint, Journal
from bamba_quant.writers.quantized import write_quantized
from bamba_quant.writers.stream import write_at
from bamba_quant.writers.tasks import Progress

Tune = Callable[[Path], Tuned]  # of the quantized file or directory
Places = Mapping[str, tuple[int, int, int]]  # by tensor: descriptor, offset, bytes


def write_tuned_gguf(
    plan: Plan,
    outfile: Path,
    tune: Tune,
    *,
    threads: int | None = None,
    compiled: bool = True,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    progress: Progress = lambda n_bytes: None,
) -> tuple[tuple[Path, ...], Tuned]:
    """``write_gguf`` of ``plan`` with the rounding that ``tune`` makes; the files, and what it made.

    ``tune`` is given a single file without tuning, which lies beside ``outfile`` meanwhile. Where the tuned rounding is
    not better the files are those that ``write_gguf`` makes. Raises as ``write_gguf``, and what ``tune`` raises; then
    no file has appeared.
    """
    if plan.config_only:
        raise PlanError("there are no weights to convert", where=plan.rows[0].source.file)
    (single,) = layout(plan.in_one_file(), outfile)
    targets = [(shard.file, shard.n_bytes) for shard in layout(plan, outfile)]
    read = {*inputs, *(file for row in plan.rows for file in row.source.files)}
    for file, _ in targets:
        check_target(file, overwrite, read)
    check_space([*targets, (single.file, single.n_bytes)])
    with temporary_file(targets[0][0], single.n_bytes) as (untuned, descriptor):
        fill(
            plan.in_one_file(), [single], [descriptor], threads=threads, compiled=compiled, progress=progress
        )
        tuned = tune(untuned)
        if tuned.record.better:
            header = len(single.header)
            _patch({row.name: (descriptor, header + row.offset, row.n_bytes) for row in single.rows}, tuned)
        stored = read_gguf(untuned).tensors
        rows = tuple(
            replace(row, source=stored[row.name], transform=IDENTITY, importance=None) for row in plan.rows
        )
        metadata = {**plan.metadata, **(tuned.record.key_values() if tuned.record.better else {})}
        final = replace(plan, rows=rows, metadata=metadata, skipped=())
        return write_gguf(final, outfile, threads=threads, overwrite=overwrite, inputs=read), tuned


def write_tuned_quantized(
    plan: Quantization,
    directory: Path,
    tune: Tune,
    *,
    begun: Fingerprint,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda n_bytes: None,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """``write_quantized`` of ``plan`` with the rounding that ``tune`` makes; the files, and what it made.

    Nothing was made where an interrupted run with the same ``begun``, which says how ``tune`` tunes, had only to tidy
    up. Raises as ``write_quantized``, and what ``tune`` raises; then nothing has appeared.
    """
    made: list[Tuned] = []

    def finish(place: Path, descriptors: Mapping[str, int], journal: Journal) -> None:
        tuned = tune(place)
        made.append(tuned)
        if not tuned.record.better:
            return
        journal.forget()  # a run that is killed from here on leaves tensors of both kinds
        _patch(
            {
                entry.name: (descriptors[shard.name], len(shard.header) + entry.offset, entry.n_bytes)
                for shard in plan.shards
                for entry in shard.entries
            },
            tuned,
        )
        config = insert_key(plan.files[CONFIG], CONFIG_KEY, tuned.record.plain(), CONFIG)
        card = plan.files[CARD] + f"\n{tuned.record.account()}\n".encode()
        for name, content in ((CONFIG, config), (CARD, card)):
            write_at(descriptors[name], 0, content)
            os.ftruncate(descriptors[name], len(content))

    files = write_quantized(
        plan,
        directory,
        threads=threads,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
        finish=finish,
        finished_by={"tuning": begun},
    )
    return files, made[0] if made else None


def _patch(places: Places, tuned: Tuned) -> None:
    for name, values in tuned.tensors.items():
        descriptor, offset, n_bytes = places[name]
        if values.nbytes != n_bytes:
            raise ValueError(f"{name}: {values.nbytes} bytes tuned, {n_bytes} stored")
        write_at(descriptor, offset, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
