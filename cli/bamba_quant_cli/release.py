"""``bamba-quant release``: all files of a preset, measured, described, and uploaded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json, print_table, size
from bamba_quant_cli.evaluate import show_evaluation
from bamba_quant_cli.evaluation_screen import print_screen
from bamba_quant_cli.imatrix import show_layers
from bamba_quant_cli.interrupts import set_interrupt_message
from bamba_quant_cli.tuning import show_tuning

if TYPE_CHECKING:
    from bamba_quant.releases.forecast import Forecast
    from bamba_quant.releases.make import Watch
    from bamba_quant.releases.tasks import Release, Task
    from bamba_quant.releases.workers import Workers

EXAMPLES = """
Examples:

  bamba-quant release ./Bamba-9B release --text wiki.test.raw --calibrate calib.txt --dry-run

  bamba-quant release ./Bamba-9B release --text wiki.test.raw --calibrate calib.txt --base-model org/Bamba-9B

  bamba-quant release ./Bamba-9B release --preset mine.toml --text wiki.test.raw --calibrate calib.txt --device cuda

  bamba-quant release ./Bamba-9B release --text wiki.test.raw --calibrate calib.txt --upload my-org/Bamba-9B

  bamba-quant release ./Bamba-9B release --text wiki.test.raw --calibrate calib.txt --workers 4

  bamba-quant release ./Bamba-9B /shared/release --text wiki.test.raw --calibrate calib.txt --device cuda --workers 8 \
--slurm partition=gpu --slurm gpus_per_node=1 --processes 1
"""


def release(
    model: opt.Model,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Directory of the release; one that an earlier run left is continued."
        ),
    ],
    text: Annotated[
        Path, typer.Option("--text", "-f", metavar="FILE", help="UTF-8 text to evaluate the files on.")
    ],
    preset: Annotated[
        str,
        typer.Option(metavar="NAME|FILE.toml", help="What is made and measured: default, small, or a file."),
    ] = "default",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure the importance matrix and to tune on, if the preset does so. Repeatable.",
        ),
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML: limits by recipe, instead of the preset's.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of files and folders; by default the model's.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base's name on the Hub, for the cards.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Its licence, such as apache-2.0; by default its card's.")
    ] = None,
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Run this many tasks at a time, each in a process of its own.",
            rich_help_panel="Workers",
        ),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Run workers as jobs of Slurm, with this option of submitit, such as partition=gpu, gpus_per_node=1 "
            "or timeout_min=600. Repeatable.",
            rich_help_panel="Workers",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Split the evaluation's text among this many processes of its worker.",
            rich_help_panel="Workers",
        ),
    ] = 1,
    upload: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload to repositories OWNER/NAME-GGUF, -FP8 and so on, which are made, private.",
            rich_help_panel="Upload",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make new repositories public.", rich_help_panel="Upload")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be made, with sizes and time.")
    ] = False,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make again what was made with other settings.")
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Make a release: GGUF types, FP8 and int4 directories, imatrix, evaluation with gates, model cards, checksums.

    A run that ends early, however it does, goes on where it was when it is started again. Exit code 1 if a gate fails;
    then nothing is uploaded.
    """
    from bamba_quant.evaluation.gates import read_gates, refuse_unmeasurable
    from bamba_quant.releases.card import about, notes_on
    from bamba_quant.releases.forecast import check_release, forecast
    from bamba_quant.releases.preset import read_preset
    from bamba_quant.releases.run import make_release, release_of
    from bamba_quant.releases.upload import check_repository
    from bamba_quant.releases.upload import upload as send

    if public and not upload:
        raise typer.BadParameter("has no effect without --upload", param_hint="--public")
    if upload:
        check_repository(upload)
    chosen = _workers(workers, slurm or [], processes)
    wanted = read_preset(preset)
    if gates:
        wanted = replace(wanted, gates=read_gates(gates))
    reading = opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
    made_of = release_of(
        model, directory, wanted, text, tuple(calibrate or ()), name=name, headers=dry_run, device=device,
        threads=threads, reading=reading,
    )  # fmt: skip
    told = about(made_of, base_model, licence, upload or "")
    planned = forecast(made_of, config_only=dry_run, timed=dry_run)
    if dry_run:
        _print_forecast(made_of, planned, as_json)
        return
    check_release(made_of, planned)
    for note in notes_on(made_of, told):
        opt.print_note(note)
    set_interrupt_message(lambda: f"finished files are kept in {directory}; the same command goes on")
    with _Screen() as screen:
        evaluation, files = make_release(
            made_of, told, workers=chosen, overwrite=overwrite, watch=screen.watch(), ended=screen.ended,
            started=lambda task, job: echo(f"{task.name}: job {job}", err=True),
        )  # fmt: skip
    refuse_unmeasurable(evaluation)
    addresses: tuple[str, ...] = ()
    if upload and evaluation.passed:
        set_interrupt_message(lambda: "the upload was interrupted; the same command goes on")
        addresses = send(made_of, told, files, private=not public, note=opt.print_note)
    if as_json:
        listed = {folder: [str(file) for file in some] for folder, some in files.items()}
        print_json({"files": listed, "passed": evaluation.passed, "uploaded": addresses})
    else:
        print_screen(evaluation)
        echo()
        for folder, some in files.items():
            n_bytes = sum(file.stat().st_size for file in some)
            echo(f"{made_of.directory / folder}  {len(some)} files, {size(n_bytes)}")
        for address in addresses:
            echo(address)
    if not evaluation.passed:
        echo("a gate failed" + (": nothing was uploaded" if upload else ""), err=True)
        raise typer.Exit(1)


class _Screen:
    """The progress of one task after the other, and a line for each that is done."""

    def __init__(self) -> None:
        self._bars = ExitStack()

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.close()

    def watch(self) -> Watch:
        from bamba_quant.releases.make import Watch

        return Watch(begin=self._begin, note=opt.print_note)

    def _begin(self, task: Task, n_bytes: int, watch: Watch) -> Watch:
        self._bars.close()
        words = {"imatrix": "imatrix: layer", "evaluate": ""}
        bar = self._bars.enter_context(Progress(words.get(task.kind, task.name), n_bytes))
        steps = self._bars.enter_context(Progress("tuning: step"))
        return replace(
            watch, n_bytes=bar.advance, layers=show_layers(bar), tuning=show_tuning(steps, bar),
            evaluation=show_evaluation(bar),
        )  # fmt: skip

    def ended(self, task: Task, made: bool) -> None:
        self._bars.close()
        echo(f"{task.name}: {'done' if made else 'was done before'}", err=True)


def _workers(count: int | None, slurm: list[str], processes: int) -> Workers | None:
    from bamba_quant.releases.workers import Workers

    if count is None and (slurm or processes > 1):
        raise typer.BadParameter(
            "has no effect without --workers", param_hint="--slurm" if slurm else "--processes"
        )
    if count is None:
        return None
    parameters: dict[str, Any] = {}
    for each in slurm:
        key, equals, value = each.partition("=")
        if not (key and equals and value):
            raise typer.BadParameter(
                f"{each!r} is not KEY=VALUE, such as partition=gpu", param_hint="--slurm"
            )
        own = key in (
            "gpus_per_node",
            "timeout_min",
            "cpus_per_task",
            "mem_gb",
        )  # submitit's own for every cluster
        parameters[key if own else f"slurm_{key}"] = int(value) if value.isdecimal() else value
    return Workers(count, "slurm" if slurm else "local", processes, parameters)


def _print_forecast(made_of: Release, planned: Forecast, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "files": [
                    {"task": task, "file": file, "bytes": n_bytes}
                    for task, files in planned.files.items()
                    for file, n_bytes in files.items()
                ],
                "bytes": planned.n_bytes,
                "peak_disk": planned.disk,
                "peak_memory": planned.memory,
                "seconds": planned.seconds,
                "notes": planned.notes,
            }
        )
        return
    rows = []
    for task in made_of.tasks:
        files, bits = planned.files.get(task.name, {}), planned.bits_per_weight.get(task.name)
        seconds = planned.seconds.get(task.name, 0.0)
        rows.append(
            (
                task.name + (" tuned" if task.name in planned.tuned else ""),
                made_of.output(task).relative_to(made_of.directory),
                len(files) or 3,
                size(sum(files.values())) if files else "-",
                "-" if bits is None else f"{bits:.2f}",
                _minutes(seconds),
            )
        )
    print_table(
        ("task", "output", "files", "size", "bits/weight", "about"),
        rows,
        right=(2, 3, 4, 5),
        dispensable=(2, 4),
    )
    echo()
    kept = dict.fromkeys(f"{note}" for notes in planned.notes.values() for note in notes)
    for note in kept:
        echo(f"note: {note}")
    echo(
        f"{size(planned.n_bytes)} in all; at most {size(planned.disk)} of disk, about {size(planned.memory)} of memory"
    )
    more = f", and the tuning of {', '.join(planned.tuned)}" if planned.tuned else ""
    echo(f"about {_minutes(sum(planned.seconds.values()))} on this machine{more}")


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
