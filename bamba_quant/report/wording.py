"""The words of every form of the report: figures with as many digits as are certain, names, gates and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from bamba_quant.evaluation.result import FIGURES, Candidate, Evaluation, Figure, FigureKind, Gate

_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(n_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    unit = 0
    while n_bytes >= 999.5 and unit < len(_UNITS) - 1:
        n_bytes /= 1000
        unit += 1
    return f"{n_bytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{digits(n_bytes, 3)} {_UNITS[unit]}"


def digits(value: float, count: int) -> str:
    """``value`` with ``count`` significant digits; scientific below 1e-4, as 3.1e-5."""
    if value == 0:
        return "0"
    exponent = _exponent(value, count)
    if exponent < -4:
        return _scientific(value, count - 1)
    return f"{value:.{max(count - 1 - exponent, 0)}f}"


def plain(value: float) -> str:
    """The shortest text of a limit, a size on an axis and the like: 0.05, 1e-5, 1200."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.10f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


@dataclass(frozen=True)
class Style:
    """How to write a value and its interval alike: decimals, after taking out a power of ten if there is one."""

    decimals: int
    exponent: int | None = None

    def __call__(self, value: float) -> str:
        if self.exponent is None:
            words, power = f"{value:.{self.decimals}f}", ""
        else:
            words, power = f"{value / 10.0**self.exponent:.{self.decimals}f}", f"e{self.exponent}"
        return words + power if any(digit in words for digit in "123456789") else "0"


def style(value: float, half_width: float | None) -> Style:
    """Down to the second digit of the uncertainty; four digits where none is known; scientific below 1e-4."""
    if half_width:
        last, first = _exponent(half_width, 2) - 1, _exponent(max(abs(value), half_width), 2)
    else:
        last, first = _exponent(value, 4) - 3, _exponent(value, 4)
    if first < -4:
        return Style(max(first - last, 0), first)
    return Style(max(-last, 0))


def shown(kind: FigureKind, figure: Figure) -> str:
    """A figure's value as the report shows it, percent figures times 100 and with their sign.

    What is nearer to no loss than the noise floor is shown as less than the floor.
    """
    if is_below_floor(kind, figure):
        return f"< {floor(kind, figure.floor)}"
    return _with_sign(kind, _style(kind, figure)(figure.value * _scale(kind)))


def interval(kind: FigureKind, figure: Figure) -> str | None:
    """The 95 % interval to the same digits, such as ``0.0278 … 0.0302``; None where there is none."""
    if figure.low is None or figure.high is None or is_below_floor(kind, figure):
        return None
    write, scale = _style(kind, figure), _scale(kind)
    return f"{write(figure.low * scale)} … {write(figure.high * scale)}"


def is_below_floor(kind: FigureKind, figure: Figure) -> bool:
    """Whether a figure whose lossless value is 0 is smaller than the noise floor."""
    return kind.perfect == 0 and figure.floor is not None and 0 < abs(figure.value) < figure.floor


def bound(kind: FigureKind, value: float, figure: Figure) -> str:
    """A gate's bound, to one digit more than the figure so that it does not round onto its limit."""
    if kind.perfect == 0 and figure.floor is not None and abs(value) < figure.floor:
        return f"< {floor(kind, figure.floor)}"
    write = _style(kind, figure)
    return _with_sign(kind, Style(write.decimals + 1, write.exponent)(value * _scale(kind)))


def limit(kind: FigureKind, value: float) -> str:
    return _with_sign(kind, plain(round(value * 100, 10) if kind.percent else value))


def floor(kind: FigureKind, value: float | None) -> str | None:
    """A noise floor, to two significant digits."""
    if value is None:
        return None
    return _with_sign(kind, digits(value * _scale(kind), 2))


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def share(value: float) -> str:
    """A part of a whole in percent, to two digits below ten."""
    return f"{digits(100 * value, 2) if 0 < value < 0.1 else f'{100 * value:.0f}'} %"


def seconds(value: float) -> str:
    if value < 1:
        return f"{digits(value * 1000, 2)} ms"
    return f"{digits(value, 3)} s" if value < 100 else f"{value / 60:.1f} min"


def label(kind: FigureKind) -> str:
    """llama-perplexity's name without the blanks that align it there."""
    return " ".join(kind.label.split())


def _style(kind: FigureKind, figure: Figure) -> Style:
    scale = _scale(kind)
    if figure.low is None or figure.high is None:
        return style(figure.value * scale, None)
    return style(figure.value * scale, (figure.high - figure.low) / 2 * scale)


def _scale(kind: FigureKind) -> float:
    return 100.0 if kind.percent else 1.0


def _with_sign(kind: FigureKind, words: str) -> str:
    return f"{words} %" if kind.percent else words


def _exponent(value: float, count: int) -> int:
    """The power of ten of the first digit once ``value`` is rounded to ``count`` digits: of 9.99 to two, 1."""
    return 0 if value == 0 else int(f"{value:.{count - 1}e}".split("e")[1])


def _scientific(value: float, decimals: int) -> str:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


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
    """Each candidate's recipe, with "tuned" if it is, where that is unique, else its label."""
    counts = Counter(candidate.model.variant for candidate in evaluation.candidates)
    return tuple(
        model.variant if counts[model.variant] == 1 and model.recipe else model.label
        for model in (candidate.model for candidate in evaluation.candidates)
    )


def named_candidates(evaluation: Evaluation) -> list[tuple[str, Candidate]]:
    """Each candidate behind its short name."""
    return list(zip(short_names(evaluation), evaluation.candidates, strict=True))


def verdict(evaluation: Evaluation) -> Verdict:
    """Whether every gate of every candidate holds, in one line, and which do not."""
    gates = [(name, gate) for name, candidate in named_candidates(evaluation) for gate in candidate.gates]
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
    unjudged = [name for name, candidate in named_candidates(evaluation) if not candidate.gates]
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
    return label(FIGURES[key]) if key in FIGURES else key


def gate_condition(gate: Gate) -> str:
    """What a gate demands, such as ``Mean KLD at most 0.05``."""
    most = "at most" if gate.kind == "max" else "at least"
    return f"{figure_label(gate.figure)} {most} {limit(FIGURES[gate.figure], gate.limit)}"


def gate_finding(gate: Gate, candidate: Candidate) -> str:
    """The bound that was tested, such as ``upper 95 % bound 0.03124``, or why none was."""
    side = "upper" if gate.kind == "max" else "lower"
    kind, figure = FIGURES[gate.figure], candidate.figures[gate.figure]
    if (figure.upper if gate.kind == "max" else figure.lower) is None:
        return "too few chunks differ for the figure to have an interval, so it cannot be tested"
    if not gate.measurable:
        return "the limit lies within three noise floors of no loss, so it cannot be tested"
    return f"{side} 95 % bound {bound(kind, gate.bound, figure)}"


def value_and_interval(key: str, figure: Figure) -> tuple[str, str | None]:
    """A figure and its interval, in words."""
    kind = FIGURES[key]
    return shown(kind, figure), interval(kind, figure)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
