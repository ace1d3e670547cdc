"""An evaluation on the terminal: llama-perplexity's table with intervals and noise floors, drift, and gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bamba_quant_cli.console import echo, print_table, size

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Candidate, Evaluation, Figure, FigureKind


def print_evaluation(evaluation: Evaluation) -> None:
    """What was run, the candidates side by side, then each in full."""
    from bamba_quant.evaluation.result import FIGURES

    text, timing = evaluation.text, evaluation.timing
    compiling = f"{100 * timing.compiling:.0f} % compiling, " if timing.compiling else ""
    device = "" if timing.device_memory is None else f", {size(timing.device_memory)} on the device"
    echo(
        f"{text.file}: {text.chunks} chunks of {text.ctx}, {text.scored} tokens scored; {evaluation.run.backend}, "
        f"{evaluation.run.dtype}; {timing.seconds:.1f} s ({100 * timing.reading:.0f} % reading, "
        f"{100 * timing.dequantizing:.0f} % dequantizing, {compiling}{100 * timing.computing:.0f} % computing), peak "
        f"{size(timing.peak_memory)}{device}"
    )
    echo()
    models = [evaluation.base, *(candidate.model for candidate in evaluation.candidates)]
    figures = [None, *(candidate.figures for candidate in evaluation.candidates)]
    chosen = ("ppl_ratio", "kld_mean", "kld_99_9", "same_top", "delta_p_rms")
    print_table(
        (
            "model",
            "type",
            "size",
            "bits per weight",
            *(" ".join(FIGURES[key].label.split()) for key in chosen),
        ),
        [
            (
                model.label,
                model.variant,
                size(model.file_bytes),
                f"{model.bits_per_weight:.2f}" if model.bits_per_weight else "",
                *(_number(FIGURES[key], found[key].value) if found else "" for key in chosen),
            )
            for model, found in zip(models, figures, strict=True)
        ],
        right=(2, 3, 4, 5, 6, 7, 8),
    )
    for candidate in evaluation.candidates:
        _print_candidate(candidate, evaluation)


def _print_candidate(candidate: Candidate, evaluation: Evaluation) -> None:
    from bamba_quant.evaluation.result import FIGURES

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
                (drift.layer, drift.kind, _db(drift.local), _db(drift.accumulated))
                for drift in candidate.layers
            ],
            right=(0, 2, 3),
        )
    by_name = {loss.name: loss for loss in candidate.tensors}
    if candidate.worst:
        echo()
        print_table(
            ("worst tensors", "type", "weight", "output"),
            [
                (name, by_name[name].format, _db(by_name[name].weight_sqnr), _db(by_name[name].output_sqnr))
                for name in candidate.worst
            ],
            right=(2, 3),
        )
    if candidate.gates:
        echo()
        for line in gate_lines(candidate):
            echo(line)


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


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def gate_lines(candidate: Candidate, failed: bool = False) -> list[str]:
    """A line a gate, or a gate that ``failed``: its verdict, its limit and what was tested."""
    from bamba_quant.evaluation.gates import Limit

    lines = []
    for gate in candidate.gates:
        if failed and gate.passed:
            continue
        name = Limit(gate.figure, gate.kind, gate.limit).name
        verdict = "PASS" if gate.passed else "FAIL" if gate.measurable else "UNMEASURABLE"
        lines.append(
            f"{verdict} {candidate.model.label}: {name} {gate.limit:g}, {'upper' if gate.kind == 'max' else 'lower'} "
            f"bound {gate.bound:.6g} (value {gate.value:.6g})"
        )
    return lines
