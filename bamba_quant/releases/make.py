"""Runs a task of a release: makes its output by the functions of the other packages, and records it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamba_quant.calibration.tune_options import Tell, TuneOptions
from bamba_quant.calibration.tuned_output import plan_tuning, write_tuned_output
from bamba_quant.checkpoint.imatrix import Imatrix, PlaceholderImatrix, read_imatrix
from bamba_quant.files.names import CARD
from bamba_quant.inference.distributed import SINGLE_PROCESS, Ranks
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.plan import Plan
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.releases.state import (
    begin,
    check_not_foreign,
    is_done,
    locked,
    model_path,
    read_record,
    remove_replaced,
    settings_now,
    write_record,
)
from bamba_quant.releases.tasks import CHECKSUMS, IMATRIX, PICTURE, Release, Task
from bamba_quant.writers import write_plan
from bamba_quant.writers.tasks import Progress

if TYPE_CHECKING:
    from bamba_quant.calibration.imatrix import Round
    from bamba_quant.evaluation.scoring import EvaluationProgress


@dataclass(frozen=True)
class Watch:
    """What a task calls as it goes on; ``begin`` gets its work in bytes, or 0, and may give another watch."""

    begin: Callable[[Task, int, Watch], Watch] = lambda task, n_bytes, watch: watch
    n_bytes: Progress = lambda n_bytes: None
    layers: Callable[[Round], None] = lambda now: None
    tuning: Tell = lambda at: None
    evaluation: Callable[[EvaluationProgress], None] = lambda now: None
    note: Callable[[str], None] = lambda note: None


def run_task(
    release: Release,
    task: Task,
    *,
    overwrite: bool = False,
    watch: Watch = Watch(),
    ranks: Ranks = SINGLE_PROCESS,
) -> bool:
    """Make what ``task`` makes unless it is done; whether it had to be made.

    With ``overwrite`` an output of other settings is replaced. Of several processes, which share an evaluation, the
    first one locks and records. Raises as ``is_done`` and ``check_not_foreign``, and what the function
    that makes the output raises.
    """
    if not ranks.first:
        if not is_done(release, task, overwrite=overwrite):
            _MAKE[task.kind](release, task, watch, ranks)
        return False
    with locked(release, task.name, watch.note):
        if is_done(release, task, overwrite=overwrite):
            return False
        if not overwrite:
            check_not_foreign(release, task)
        begin(release, task)
        started, settings = time.monotonic(), settings_now(release, task)
        old = read_record(release, task.name)
        release.output(task).parent.mkdir(parents=True, exist_ok=True)
        files = _MAKE[task.kind](release, task, watch, ranks)
        remove_replaced(release, old, files)
        write_record(release, task, settings, files, time.monotonic() - started)
    return True


def plan_of(release: Release, task: Task, imatrix: Imatrix | None, *, config_only: bool = False) -> Plan:
    """The plan of a GGUF file or a directory; with ``config_only`` a config.json is enough, as for a dry run."""
    more: dict[str, Any] = {
        "imatrix": imatrix, "reading": release.reading, "allow_config_only": config_only,
    }  # fmt: skip
    if task.kind == "directory":
        return plan_quantization(release.model, task.name, **more)
    return plan_conversion(
        release.model, outtype=task.name, outfile=release.output(task), split_max_bytes=release.preset.split_bytes,
        **more,
    )  # fmt: skip


def planned_imatrix(release: Release) -> Imatrix | None:
    """One to plan with before it is measured."""
    return PlaceholderImatrix() if release.preset.imatrix_chunks else None


def _quantize(release: Release, task: Task, watch: Watch, ranks: Ranks) -> tuple[Path, ...]:
    imatrix = None
    if task.needs:
        file = release.output(Task(IMATRIX, "imatrix"))
        imatrix = replace(
            read_imatrix(file), file=Path(file.name)
        )  # the file says its name, not where it lay
    plan, output = plan_of(release, task, imatrix), release.output(task)
    watch = watch.begin(task, plan.work_bytes, watch)
    for note in plan.notes:
        watch.note(f"{task.name}: {note}")
    writing: dict[str, Any] = {"threads": release.threads, "overwrite": True, "progress": watch.n_bytes}
    if task.kind == "directory":
        writing["resume"] = True
        for name in (
            PICTURE,
            CHECKSUMS,
        ):  # of an earlier release; only a directory of nothing but a model is replaced
            (output / name).unlink(missing_ok=True)
    if task.name not in release.preset.tune:
        return _without_card(write_plan(plan, output, **writing))
    options = TuneOptions(**release.preset.tune_options, device=release.device)
    tuning = plan_tuning(release.calibrate, options, output=output, resume=True, overwrite=True)
    files, _ = write_tuned_output(
        plan, output, tuning, reading=release.reading, tell=watch.tuning, note=watch.note, **writing
    )
    return _without_card(files)


def _without_card(files: Sequence[Path]) -> tuple[Path, ...]:
    """The release writes the cards of directories."""
    return tuple(file for file in files if file.name != CARD)


def _measure(release: Release, task: Task, watch: Watch, ranks: Ranks) -> tuple[Path, ...]:
    from bamba_quant.calibration.imatrix import measure_imatrix
    from bamba_quant.calibration.imatrix_writer import write_imatrix

    output = release.output(task)
    watch = watch.begin(task, 0, watch)
    measured = measure_imatrix(
        release.model,
        release.calibrate,
        chunks=release.preset.imatrix_chunks,
        output=True,
        device=release.device,
        reading=release.reading,
        progress=watch.layers,
    )
    for note in measured.notes:
        watch.note(note)
    names = tuple(Path(each).name for each in measured.sums.datasets)
    write_imatrix(replace(measured.sums, datasets=names), output, overwrite=True)
    return (output,)


def _evaluate(release: Release, task: Task, watch: Watch, ranks: Ranks) -> tuple[Path, ...]:
    from bamba_quant.evaluation.evaluate import evaluate
    from bamba_quant.report.write import write_reports

    watch = watch.begin(task, 0, watch)
    files = [model_path(release, each) for each in release.tasks if each.name in task.needs]
    evaluation = evaluate(
        release.model,
        files,
        release.text,
        evaluation_options(release),
        gates=release.preset.gates or None,
        progress=watch.evaluation,
        note=watch.note,
        ranks=ranks,
    )
    if not ranks.first:
        return ()
    return tuple(
        write_reports(evaluation, release.output(task), overwrite=True, inputs=[release.model, *files])
    )


def evaluation_options(release: Release) -> Any:
    """The options of the release's evaluation."""
    from bamba_quant.evaluation.run import EvaluationOptions

    preset = release.preset
    return EvaluationOptions(
        ctx=preset.ctx, chunks=preset.chunks, device=release.device, reading=release.reading
    )


_MAKE: dict[str, Callable[[Release, Task, Watch, Ranks], tuple[Path, ...]]] = {
    "imatrix": _measure,
    "gguf": _quantize,
    "directory": _quantize,
    "evaluate": _evaluate,
}
