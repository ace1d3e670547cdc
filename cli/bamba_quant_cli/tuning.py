"""The tuning options that several commands share, and what these commands print about tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bamba_quant_cli.console import Progress, echo
from bamba_quant_cli.options import parse_file_size

if TYPE_CHECKING:
    from bamba_quant.calibration.tune_options import TuneProgress
    from bamba_quant.calibration.tuned_output import Tuning
    from bamba_quant.metadata.tune_record import Tuned


@dataclass(frozen=True)
class TuneArguments:
    """The options of tuning, as typed: ``with_asked_options`` makes them options of a command."""

    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT|self",
            help="Tune the rounding against the original's logits on this UTF-8 text, plain or .xz, or on text that "
            "the model writes itself; type and size stay. Repeatable.",
        ),
    ] = None
    tune_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the texts at most; of --tune self as many, 500,000 by default."),
    ] = None
    tune_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the optimizer, by default by the number of tokens.")
    ] = None
    max_minutes: Annotated[
        float | None, typer.Option(help="Tune no longer than this: the schedule is fitted to the time.")
    ] = None
    tune_seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0
    tune_device: Annotated[str, typer.Option(help="torch's name of the device to tune on.")] = "cpu"
    tune_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16",
            help="float32 by gradients of the whole model, or bfloat16 a layer at a time, in 10 bytes a weight, on a "
            "GPU; by default float32 if it fits.",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Tune in bfloat16 and use so much of the GPU at most, such as 24GB; what does not fit stays in main "
            "memory.",
        ),
    ] = None
    tune_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where an interrupted tuning is kept for --resume; by default beside the output.",
        ),
    ] = None

    def plan(self, output: Path, *, resume: bool, overwrite: bool) -> Tuning | None:
        """The tuning of ``output``, with its texts read; None without --tune, when other tuning options are errors."""
        if not self.tune:
            usual = TuneArguments()
            for name, default in vars(usual).items():
                if name != "tune" and getattr(self, name) != default:
                    raise typer.BadParameter(
                        "has no effect without --tune", param_hint="--" + name.replace("_", "-")
                    )
            return None
        from bamba_quant.calibration.tune_options import TuneOptions
        from bamba_quant.calibration.tuned_output import plan_tuning

        options = TuneOptions(
            tokens=self.tune_tokens,
            steps=self.tune_steps,
            max_minutes=self.max_minutes,
            seed=self.tune_seed,
            device=self.tune_device,
            dtype=self.tune_dtype,
            max_memory=None if self.max_memory is None else parse_file_size(self.max_memory, "--max-memory"),
            state=self.tune_state,
        )
        return plan_tuning(self.tune, options, output=output, resume=resume, overwrite=overwrite)


def with_asked_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the fields of its parameter ``asked``, a dataclass of options, in the parameter's place."""
    hints = get_type_hints(command, include_extras=True)
    group = hints["asked"]
    options = get_type_hints(group, include_extras=True)
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name == "asked":
            parameters += [
                Parameter(f.name, parameter.kind, default=f.default, annotation=options[f.name])
                for f in fields(group)
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def run(**given: Any) -> None:
        command(asked=group(**{f.name: given.pop(f.name) for f in fields(group)}), **given)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def show_tuning(steps: Progress, writing: Progress) -> Callable[[TuneProgress], None]:
    """A function that shows in ``steps`` how far tuning is, and ends the bar of ``writing`` before."""

    def show(at: TuneProgress) -> None:
        writing.close()
        steps.update(
            at.step,
            at.steps,
            f", loss {at.loss:.4g}, held-out KLD {at.held_out_kld:.4g} ({at.before:.4g} without)",
            seconds_left=at.seconds_left,
            print_now=at.step in (1, at.steps),
        )

    return show


def tuned_as_json(tuned: Tuned | None) -> dict[str, Any]:
    """The result of tuning for a command's JSON; empty without --tune."""
    if tuned is None:
        return {}
    return {"tuned": {"better": tuned.record.better, **asdict(tuned.record), "changed": dict(tuned.changed)}}


def print_tuned(tuned: Tuned | None) -> None:
    """Print the result of tuning in one line."""
    if tuned is not None and tuned.record.better:
        echo(tuned.record.line(), err=True)
    elif tuned is not None:
        echo(
            "note: tuning did not improve the held-out text, so the output is not tuned (mean "
            f"KLD {tuned.record.held_out_kld_before:.4g})",
            err=True,
        )
