"""What every form of the report says alike: names short enough for a chart, the verdict, and the figures that lead."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, Gate
from bamba_quant.report import numbers

# The figures that lead, with names short enough to head a column.
LEADING = {
    "kld_mean": "Mean KLD",
    "kld_99_9": "99.9 % KLD",
    "ppl_ratio": "PPL ratio",
    "same_top": "Same top\u00a0p",
    "top_5_overlap": "Top-5 overlap",
    "delta_p_rms": "RMS Δp",
    "flips": "Flips",
}


def gate_word(gate: Gate) -> str:
    return "pass" if gate.passed else "fail" if gate.measurable else "refused"


@dataclass(frozen=True)
class Verdict:
    state: Literal["pass", "fail", "none"]
    word: str
    title: str
    detail: str


def short_names(evaluation: Evaluation) -> tuple[str, ...]:
    """Each candidate's recipe, with "tuned" where it is, if that tells it from others, else its unique label."""
    counts = Counter(candidate.model.variant for candidate in evaluation.candidates)
    return tuple(
        model.variant if counts[model.variant] == 1 and model.recipe else model.label
        for model in (candidate.model for candidate in evaluation.candidates)
    )


def verdict(evaluation: Evaluation) -> Verdict:
    """Whether every gate of every candidate holds, in one line, and which do not."""
    gates = [
        (name, gate)
        for name, candidate in zip(short_names(evaluation), evaluation.candidates, strict=True)
        for gate in candidate.gates
    ]
    files = _counted(len(evaluation.candidates), "file")
    if not gates:
        return Verdict(
            "none",
            "NO GATES",
            f"{files} measured, nothing judged",
            "No gates were set: the figures stand without a verdict.",
        )
    failed = [(name, gate) for name, gate in gates if not gate.passed]
    judged = sum(bool(candidate.gates) for candidate in evaluation.candidates)
    unjudged = [
        name
        for name, candidate in zip(short_names(evaluation), evaluation.candidates, strict=True)
        if not candidate.gates
    ]
    left = f" No gate was set for {', '.join(unjudged)}." if unjudged else ""
    if not failed:
        return Verdict(
            "pass",
            "PASS",
            f"{_counted(len(gates), 'gate')} of {_counted(judged, 'file')}: all hold",
            f"Every limit is kept by the worse end of its figure's interval, not merely by its mean.{left}",
        )
    named = "; ".join(f"{name}: {figure_label(gate.figure)}" for name, gate in failed)
    return Verdict(
        "fail",
        "FAIL",
        f"{len(failed)} of {_counted(len(gates), 'gate')} failed",
        f"What failed: {named}.{left}",
    )


def figure_label(key: str) -> str:
    return numbers.label(FIGURES[key]) if key in FIGURES else key


def gate_condition(gate: Gate) -> str:
    """What a gate demands, such as ``Mean KLD at most 0.05``."""
    most = "at most" if gate.kind == "max" else "at least"
    return f"{figure_label(gate.figure)} {most} {numbers.limit(FIGURES[gate.figure], gate.limit)}"


def gate_finding(gate: Gate, candidate: Candidate) -> str:
    """The bound that was tested, such as ``upper 95 % bound 0.03124``, or why none was."""
    side = "upper" if gate.kind == "max" else "lower"
    kind, figure = FIGURES[gate.figure], candidate.figures[gate.figure]
    if (figure.upper if gate.kind == "max" else figure.lower) is None:
        return "too few chunks differ for the figure to have an interval, so it cannot be tested"
    if not gate.measurable:
        return "the limit lies within three noise floors of no loss, so it cannot be tested"
    return f"{side} 95 % bound {numbers.bound(kind, gate.bound, figure)}"


def cell(key: str, figure: Figure) -> tuple[str, str | None]:
    """A figure and its interval, in words."""
    kind = FIGURES[key]
    return numbers.shown(kind, figure), numbers.interval(kind, figure)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
