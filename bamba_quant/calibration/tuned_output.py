"""Plans a tuning of the rounding, and writes outputs that are tuned: the API to ``calibration.tune``."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.calibration.texts import Text, read_texts
from bamba_quant.calibration.tune_options import Tell, TuneOptions
from bamba_quant.calibration.tune_state import is_state
from bamba_quant.checkpoint import ReadOptions, open_checkpoint
from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.errors import CheckpointError, OutputError, PlanError
from bamba_quant.families.transforms import IDENTITY
from bamba_quant.files.json_file import insert_key
from bamba_quant.files.names import CARD, CONFIG
from bamba_quant.metadata.tune_record import CONFIG_KEY, SELF, Tuned, read_record
from bamba_quant.planning.gguf_layout import lay_out_gguf, with_key_values
from bamba_quant.planning.plan import Plan
from bamba_quant.writers import write_plan
from bamba_quant.writers.atomic import check_space, check_target, temporary_file
from bamba_quant.writers.journal import Fingerprint, Journal
from bamba_quant.writers.plan_writer import fill
from bamba_quant.writers.stream import write_at
from bamba_quant.writers.tasks import Progress

Note = Callable[[str], None]
Tune = Callable[[Path], Tuned]  # called with the untuned file or directory

SELF_TOKENS = 500_000  # that a model writes by default


@dataclass(frozen=True)
class Tuning:
    """On which texts rounding is tuned, and how."""

    texts: tuple[Text, ...]
    options: TuneOptions

    def fingerprint(self) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that resumes it."""
        return self.options.deciding() | {"texts": [text.sha256 for text in self.texts]}


def plan_tuning(
    texts: Sequence[str | Path],
    options: TuneOptions = TuneOptions(),
    *,
    output: Path,
    resume: bool = False,
    overwrite: bool = False,
) -> Tuning:
    """Read ``texts``, files or "self", which stands for text that the model writes; check what an earlier run left.

    The state of an interrupted tuning is kept in ``options.state``, by default beside ``output``; ``resume`` continues
    from it if there is one. Raises ``CheckpointError`` for a text that cannot be read, and ``OutputError`` for a state
    of an earlier run, unless ``resume`` or ``overwrite``, and for another file of that name.
    """
    files = [Path(text) for text in texts if str(text) != SELF]
    state = options.state or output.with_name(f"{output.name}.tuning")
    if options.state is not None:
        _check_state(state, output)
    if resume and not overwrite and _was_finished(output, state):
        _remove(state)
    left = state.exists()
    if left and not (resume or overwrite):
        raise OutputError(
            "the state of an interrupted tuning exists",
            where=state,
            fix="continue with --resume, or start again with --overwrite",
        )
    if len(files) < len(texts):
        options = replace(options, self_tokens=options.self_tokens or options.tokens or SELF_TOKENS)
    options = replace(options, state=state, resume=resume and left)
    return Tuning(read_texts(files) if files else (), options)


def write_tuned_output(
    plan: Plan,
    output: Path,
    tuning: Tuning,
    *,
    reading: ReadOptions = ReadOptions(),
    inputs: Collection[Path] = (),
    resume: bool = False,
    tell: Tell = lambda at: None,
    note: Note = lambda note: None,
    **writing: Any,
) -> tuple[tuple[Path, ...], Tuned | None]:
    """Write ``plan`` to the file or directory ``output``, tuned; the files, and what the tuning made.

    ``tell`` is called with the progress of the tuning, ``note`` with what it chose on its own; ``reading`` is that of
    the plan, and ``writing`` other arguments of ``write_plan``. The output is never worse on the held-out text: if
    tuning did not help, it is the untuned one. Raises as ``write_plan`` and ``tune`` do; then no file has appeared.
    """
    from bamba_quant.calibration.tune import tune  # which needs torch, and says so before anything is written

    def tune_output(quantized: Path) -> Tuned:
        return tune(plan.checkpoint.path, quantized, tuning.texts, tuning.options, tell, note, reading)

    if plan.container == "safetensors":
        written = write_tuned_directory(
            plan, output, tune_output, begun=tuning.fingerprint(), resume=resume, **writing
        )
    elif all(row.format.fields is None for row in plan.rows):
        raise PlanError(
            "there is nothing to tune: no tensor is quantized",
            found=plan.recipe,
            fix="choose a type such as q4_k_m",
        )
    else:
        read = {*inputs, *(text.path for text in tuning.texts)}
        written = write_tuned_gguf(plan, output, tune_output, inputs=read, **writing)
    _remove(tuning.options.state)
    return written


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
        raise PlanError(
            "the model has only a config.json, so there are no weights to write",
            where=plan.checkpoint.path,
            fix="fetch the weights",
        )
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


def _was_finished(output: Path, state: Path) -> bool:
    """Whether a tuned ``output`` came after ``state``, whose run was killed before it could remove that."""
    with suppress(OSError, CheckpointError):
        file = output / CONFIG if output.is_dir() else output
        newer = file.stat().st_mtime_ns >= state.stat().st_mtime_ns
        return newer and read_record(open_checkpoint(output)) is not None
    return False


def _check_state(state: Path, output: Path) -> None:
    """Raise ``OutputError`` where the state cannot be written, or would replace a file that is something else."""
    if state.resolve() == output.resolve():
        raise OutputError(
            "the tuning's state and the output have the same name",
            where=state,
            fix="choose another name (--tune-state)",
        )
    if not state.parent.is_dir():
        raise OutputError(
            "the directory of the tuning's state does not exist", where=state.parent, fix="create it first"
        )
    if (state.exists() or state.is_symlink()) and not is_state(state):
        raise OutputError(
            "the file for the tuning's state exists and has other content",
            where=state,
            expected="the state of an interrupted tuning, or no file",
            fix="choose another name (--tune-state)",
        )


def _remove(state: Path | None) -> None:
    if state is not None:
        with suppress(OSError):
            state.unlink(missing_ok=True)
