"""Makes a whole release, one task after the other or on workers, then writes its cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bamba_quant.errors import CheckpointError, OutputError
from bamba_quant.hub import local_path
from bamba_quant.inference.threads import use_threads
from bamba_quant.metadata.model_name import name_of
from bamba_quant.releases.card import About, about, check_files_are_own, read_evaluation, write_cards
from bamba_quant.releases.forecast import check_release, forecast
from bamba_quant.releases.make import Watch, run_task
from bamba_quant.releases.preset import Preset, read_preset
from bamba_quant.releases.state import is_done
from bamba_quant.releases.tasks import Release, Task
from bamba_quant.releases.upload import check_repositories, check_repository
from bamba_quant.releases.upload import upload as send
from bamba_quant.releases.workers import Workers, run_on_workers
from bamba_quant.report.html import NotebookEvaluation


def release_of(
    model: Path, directory: Path, preset: Preset, text: Path, calibrate: tuple[Path, ...] = (), *,
    name: str | None = None, headers: bool = False, **more: object,
) -> Release:  # fmt: skip
    """A ``Release`` with absolute paths, so that workers find them; ``more`` are other fields.

    ``model`` may be a name on the Hub; with ``headers`` its weights are not fetched.

    Raises ``CheckpointError`` for a text that is not there, ``OutputError`` for a directory that is a file, or is or
    holds the model.
    """
    for file in (text, *calibrate):
        if not file.is_file():
            raise CheckpointError("there is no such text", where=file, expected="a UTF-8 file")
    model = local_path(model, headers=headers)
    place = directory.resolve()
    if place.exists() and not place.is_dir():
        raise OutputError("the release's directory is a file", where=directory, fix="give another name")
    if model.exists() and model.resolve().is_relative_to(place):
        raise OutputError(
            "the model lies in the release's directory", where=directory, fix="give another directory"
        )
    texts = tuple(each.resolve() for each in calibrate)
    own = name or name_of(model).name
    return Release(model.absolute(), place, preset, own, text.resolve(), texts, **more)  # type: ignore[arg-type]


def make_release(
    release: Release,
    told: About,
    *,
    workers: Workers | None = None,
    overwrite: bool = False,
    watch: Watch = Watch(),
    ended: Callable[[Task, bool], None] = lambda task, made: None,
    started: Callable[[Task, str], None] = lambda task, job: None,
) -> tuple[NotebookEvaluation, dict[str, list[Path]]]:
    """Run the tasks that are not done, and write the cards: the evaluation, and the files of each folder.

    ``ended`` gets each task and whether it had to be made; ``started`` a task and the number of its job, of workers.
    Raises what the tasks raise; what was finished stays, and a later call goes on from there.
    """
    check_repositories(release, told)
    for task in release.tasks:
        is_done(release, task, overwrite=overwrite)  # raises before hours of work
    if not overwrite:
        check_files_are_own(release)
    if workers is not None:
        done = {task.name for task in release.tasks if is_done(release, task, overwrite=overwrite)}
        for task in release.tasks:
            if task.name in done:
                ended(task, False)
        run_on_workers(
            release, workers, overwrite=overwrite, note=watch.note, started=started,
            ended=lambda task: ended(task, True),
        )  # fmt: skip
    else:
        use_threads(release.threads)
        for task in release.tasks:
            ended(task, run_task(release, task, overwrite=overwrite, watch=watch))
    files = write_cards(release, told)
    return NotebookEvaluation(**vars(read_evaluation(release))), files


def release_model(
    model: Path,
    directory: Path,
    text: Path,
    preset: str = "default",
    calibrate: tuple[Path, ...] = (),
    *,
    base_model: str | None = None,
    licence: str | None = None,
    workers: int | None = None,
    upload: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    **more: object,
) -> NotebookEvaluation:
    """The release of a preset by its name, from start to end; its evaluation.

    ``base_model`` is the base's name on the Hub. With ``workers`` so many tasks run at a time, each in a process of its
    own. ``upload``, OWNER/NAME, uploads to OWNER/NAME-GGUF and so on where all gates hold, ``private`` or public.
    ``more`` are ``name``, ``device``, ``threads`` and ``reading`` of ``Release``.
    """
    if upload:
        check_repository(upload)
    release = release_of(model, directory, read_preset(preset), text, calibrate, **more)  # type: ignore[arg-type]
    told = about(release, base_model, licence, upload or "")
    check_release(release, forecast(release, timed=False))
    chosen = Workers(workers) if workers else None
    evaluation, files = make_release(release, told, workers=chosen, overwrite=overwrite)
    if upload and evaluation.passed:
        send(release, told, files, private=private)
    return evaluation
