"""An evaluation in full: llama-perplexity's table with intervals and noise floors, drift, gates and remedies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bamba_quant_cli.console import echo, print_table, size
from bamba_quant_cli.terminal import echo_wrapped

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Candidate, Evaluation, Figure, FigureKind


def print_tasks(evaluation: Evaluation) -> None:
    """A table of each metric of each task; a narrow terminal has no room for the questions lost and gained."""
    from bamba_quant.report import task_rows

    for result in evaluation.tasks:
        echo()
        echo_wrapped(f"{result.task}: {task_rows.metric(result)}, {result.questions:,} questions")
        print_table(
            task_rows.HEADER[3:], list(task_rows.model_rows(result)), right=(1, 2, 3), dispensable=(3,)
        )


def print_details(evaluation: Evaluation) -> None:
    """How it was run and where the time went, then each candidate in full."""
    from bamba_quant.report.wording import counted, time_shares

    run, timing = evaluation.run, evaluation.timing
    device = "" if timing.device_memory is None else f", {size(timing.device_memory)} on the device"
    echo()
    echo_wrapped(
        f"{run.backend}, {run.dtype}, {counted(run.threads, 'thread')}; "
        f"{timing.seconds:.1f} s ({time_shares(timing)}), peak {size(timing.peak_memory)}{device}"
    )
    for candidate in evaluation.candidates:
        _print_candidate(candidate)
        print_worst(evaluation, candidate)


def _print_candidate(candidate: Candidate) -> None:
    from bamba_quant.evaluation.result import FIGURES
    from bamba_quant.report.wording import decibels

    headings = {
        "perplexity": "Perplexity statistics",
        "divergence": "KL divergence statistics",
        "probability": "Token probability statistics",
        "agreement": "Agreement",
    }
    echo()
    echo(candidate.model.label)
    for section, heading in headings.items():
        echo()
        echo(f"====== {heading} ======")
        print_table(
            ("", "value", "±", "95 % from", "to", "noise floor"),
            [_row(kind, candidate.figures[key]) for key, kind in FIGURES.items() if kind.section == section],
            right=(1, 2, 3, 4, 5),
        )
    flips = candidate.flips
    echo()
    echo(
        f"flips: {flips.lost} right tokens lost, {flips.gained} gained; McNemar's exact test p = {flips.p_value:.2g}"
    )
    if candidate.layers:
        echo()
        echo("Where it was lost (SQNR in dB, less is worse):")
        print_table(
            ("layer", "kind", "local", "accumulated"),
            [
                (drift.layer, drift.kind, decibels(drift.local), decibels(drift.accumulated))
                for drift in candidate.layers
            ],
            right=(0, 2, 3),
        )
    if candidate.gates:
        echo()
        for line in gate_lines(candidate):
            echo(line)


def print_worst(evaluation: Evaluation, candidate: Candidate) -> None:
    """The candidate's worst tensors by the file's own names, and the command that stores them with more bits."""
    from bamba_quant.report.remedies import remedy, worst_tensors
    from bamba_quant.report.wording import decibels, named_candidates

    worst = worst_tensors(candidate)
    if not worst:
        return
    name = next(name for name, other in named_candidates(evaluation) if other is candidate)
    echo()
    print_table(
        (f"worst tensors of {name}", "type", "weight, dB", "output, dB"),
        [
            (loss.stored_name, loss.format, decibels(loss.weight_sqnr), decibels(loss.output_sqnr))
            for loss in worst
        ],
        right=(2, 3),
        dispensable=(2,),
    )
    found = remedy(evaluation, candidate)
    if found is None:
        return
    echo()
    which = "the worst" if len(found.tensors) == 1 else f"the worst {len(found.tensors)}"
    if sum(part.startswith("--ignore") for part in found.parts) > len(found.tensors):
        which += ", and the matrices that are fused with them,"
    echo_wrapped(
        f"To store {which} with more bits"
        + (":" if found.complete else ", add to the command that made the file:")
    )
    for number, part in enumerate(found.parts, start=1):
        echo(f"  {'  ' if number > 1 else ''}{part}" + (" \\" if number < len(found.parts) else ""))


def _row(kind: FigureKind, figure: Figure) -> tuple[str, ...]:
    low, high = figure.low, figure.high
    return (
        kind.label,
        _number(kind, figure.value),
        "" if figure.naive_error is None else _number(kind, figure.naive_error),
        "" if low is None else _number(kind, low),
        "" if high is None else _number(kind, high),
        ""
        if figure.floor is None
        else f"{100 * figure.floor:.1e} %"
        if kind.percent
        else f"{figure.floor:.1e}",
    )


def _number(kind: FigureKind, value: float) -> str:
    return f"{100 * value:.3f} %" if kind.percent else f"{value:.6f}"


def gate_lines(candidate: Candidate, *, failed: bool = False, name: str = "") -> list[str]:
    """A line a gate, or a gate that ``failed``: its verdict, the candidate's ``name`` or label, limit and bound."""
    from bamba_quant.evaluation.gates import Limit

    lines = []
    for gate in candidate.gates:
        if failed and gate.passed:
            continue
        limit = Limit(gate.figure, gate.kind, gate.limit).name
        verdict = "PASS" if gate.passed else "FAIL" if gate.measurable else "UNMEASURABLE"
        side = "upper" if gate.kind == "max" else "lower"
        lines.append(
            f"{verdict} {name or candidate.model.label}: {limit} {gate.limit:g}, {side} bound {gate.bound:.6g} "
            f"(value {gate.value:.6g})"
        )
    return lines
