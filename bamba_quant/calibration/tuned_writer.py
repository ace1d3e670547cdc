"""Writes outputs whose rounding is tuned: an untuned output first, which is tuned before it appears."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.errors import PlanError
from bamba_quant.families.transforms import IDENTITY
from bamba_quant.files.json_file import insert_key
from bamba_quant.metadata.tune_record import CONFIG_KEY, Tuned
from bamba_quant.planning.gguf_layout import lay_out_gguf, with_key_values
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.small_files import CARD, CONFIG
from bamba_quant.writers import write_plan
from bamba_quant.writers.atomic import check_space, check_target, temporary_file
from bamba_quant.writers.journal import Fingerprint, Journal
from bamba_quant.writers.plan_writer import fill
from bamba_quant.writers.stream import write_at
from bamba_quant.writers.tasks import Progress

Tune = Callable[[Path], Tuned]  # called with the untuned file or directory


def write_tuned_gguf(
    plan: Plan,
    outfile: Path,
    tune: Tune,
    *,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    **options: Any,
) -> tuple[tuple[Path, ...], Tuned]:
    """``write_plan`` of a GGUF's ``plan`` with the rounding that ``tune`` makes; the files, and what it made.

    ``tune`` gets a single untuned file, which lies beside ``outfile`` meanwhile. If the tuned rounding is not better,
    the files are those that ``write_plan`` makes. Raises as ``write_plan``, whose ``options`` are threads, compiled
    and progress, and what ``tune`` raises; then no file has appeared.
    """
    if plan.config_only:
        raise PlanError("there are no weights to write", where=plan.checkpoint.path)
    single, targets = lay_out_gguf(plan), list(plan.paths(outfile).items())
    (n_bytes,) = single.paths(outfile).values()
    read = {*inputs, *plan.inputs}
    for file, _ in targets:
        check_target(file, overwrite, read)
    check_space([*targets, (outfile, n_bytes)])
    with temporary_file(targets[0][0], n_bytes) as (untuned, descriptor):
        fill(single, [descriptor], **options)
        tuned = tune(untuned)
        if tuned.record.better:
            _write_tensors(single, {"": descriptor}, tuned)
        stored = read_gguf(untuned).tensors
        rows = tuple(
            replace(row, source=stored[row.name], transform=IDENTITY, importance=None) for row in plan.rows
        )
        metadata = {**plan.metadata, **(tuned.record.key_values() if tuned.record.better else {})}
        final = with_key_values(replace(plan, rows=rows, skipped=()), metadata)
        files = write_plan(final, outfile, threads=options.get("threads"), overwrite=overwrite, inputs=read)
        return files, tuned


def write_tuned_directory(
    plan: Plan,
    directory: Path,
    tune: Tune,
    *,
    begun: Fingerprint,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda n_bytes: None,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """``write_plan`` of a directory's ``plan`` with the rounding that ``tune`` makes; the files, and what it made.

    ``begun`` describes how ``tune`` tunes. Nothing was made where an interrupted run with the same ``begun`` had only
    to tidy up. Raises as ``write_plan``, and what ``tune`` raises; then nothing has appeared.
    """
    made: list[Tuned] = []

    def finish(place: Path, descriptors: Mapping[str, int], journal: Journal) -> None:
        tuned = tune(place)
        made.append(tuned)
        if not tuned.record.better:
            return
        journal.forget()  # a run that is killed from here on leaves both untuned and tuned tensors
        _write_tensors(plan, descriptors, tuned)
        config = insert_key(plan.files[CONFIG], CONFIG_KEY, tuned.record.plain(), CONFIG)
        card = plan.files[CARD] + f"\n{tuned.record.account()}\n".encode()
        for name, content in ((CONFIG, config), (CARD, card)):
            write_at(descriptors[name], 0, content)
            os.ftruncate(descriptors[name], len(content))

    files = write_plan(
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


def _write_tensors(plan: Plan, descriptors: Mapping[str, int], tuned: Tuned) -> None:
    """Write the tuned tensors over the untuned ones; ``descriptors`` are by the names of the shards."""
    parts = {part.name: (shard, part) for shard in plan.shards for part in shard.parts}
    for name, values in tuned.tensors.items():
        shard, part = parts[name]
        if values.nbytes != part.n_bytes:
            raise ValueError(f"{name}: {values.nbytes} bytes tuned, {part.n_bytes} stored")
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        write_at(descriptors[shard.name], len(shard.header) + part.offset, raw)
