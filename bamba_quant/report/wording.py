"""The words of every form of the report: figures with as many digits as are certain, names, gates and the verdict."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from bamba_quant.evaluation.provenance import ModelFile, Timing
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


_MOST_DECIMALS = 6


def column_style(kind: FigureKind, figures: Collection[Figure]) -> Style:
    """The decimals that all figures of a column have, so that they line up.

    The last digit is worth at most half of the smallest uncertainty (half an interval) among them. Perplexities have
    four digits: their intervals are those of the text. Values below 1e-4 that would need more than six decimals do not
    count: they stay scientific.
    """
    needed = [_decimals(kind, figure) for figure in figures if not is_below_floor(kind, figure)]
    return Style(max((min(each, _MOST_DECIMALS) for each in needed if each is not None), default=0))


def _decimals(kind: FigureKind, figure: Figure) -> int | None:
    value, half = abs(figure.value * _scale(kind)), _half_width(kind, figure)
    if kind.perfect is None or half is None:
        needed = (3 if kind.perfect is None else 2) - _exponent(value, 3)
    else:
        needed = math.ceil(-math.log10(half / 2)) if half else 0
    return None if needed > _MOST_DECIMALS and value < 1e-4 else max(needed, 0)


def shown(kind: FigureKind, figure: Figure, column: Style | None = None) -> str:
    """A figure's value as the report shows it, percent figures times 100 and with their sign.

    What is nearer to no loss than the noise floor is shown as less than the floor. ``column``: of ``column_style``.
    """
    if is_below_floor(kind, figure):
        return f"< {floor(kind, figure.floor)}"
    return _with_sign(kind, _style(kind, figure, column)(figure.value * _scale(kind)))


def interval(kind: FigureKind, figure: Figure, column: Style | None = None) -> str | None:
    """The 95 % interval to the same digits, such as ``0.0278 … 0.0302``; None where there is none."""
    if figure.low is None or figure.high is None or is_below_floor(kind, figure):
        return None
    write, scale = _style(kind, figure, column), _scale(kind)
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


def time_shares(timing: Timing) -> str:
    """Where the time went."""
    parts = [
        (timing.reading, "reading"),
        (timing.dequantizing, "dequantizing"),
        *([(timing.compiling, "compiling")] if timing.compiling else []),
        (timing.computing, "computing"),
    ]
    products = "" if timing.products is None else f", {share(timing.products)} in matrix products"
    return ", ".join(f"{share(part)} {name}" for part, name in parts) + products


def seconds(value: float) -> str:
    if value < 1:
        return f"{digits(value * 1000, 2)} ms"
    return f"{digits(value, 3)} s" if value < 100 else f"{value / 60:.1f} min"


def label(kind: FigureKind) -> str:
    """llama-perplexity's name without the blanks that align it there."""
    return " ".join(kind.label.split())


def _style(kind: FigureKind, figure: Figure, column: Style | None = None) -> Style:
    if column is not None and _decimals(kind, figure) is not None:
        return column
    return style(figure.value * _scale(kind), _half_width(kind, figure))


def _half_width(kind: FigureKind, figure: Figure) -> float | None:
    if figure.low is None or figure.high is None:
        return None
    return (figure.high - figure.low) / 2 * _scale(kind)


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
    "ppl": "PPL",
    "ppl_ratio": "PPL ratio",
    "kld_99_9": "99.9 % KLD",
    "same_top": "Same top\u00a0p",
    "top_5_overlap": "Top-5 overlap",
    "delta_p_rms": "RMS Δp",
    "flips": "Flips",
}


def gate_word(gate: Gate) -> str:
    return "pass" if gate.passed else "fail" if gate.measurable else "refused"


def by_size(evaluation: Evaluation) -> Evaluation:
    """``evaluation`` with its candidates in the order in which reports show them, the smallest file first."""
    ordered = sorted(evaluation.candidates, key=lambda candidate: candidate.model.file_bytes)
    return replace(evaluation, candidates=tuple(ordered))


def short_names(evaluation: Evaluation) -> tuple[str, ...]:
    """Each candidate's recipe, with "tuned" if it is, where that is unique, else its label."""
    return unique_names([candidate.model for candidate in evaluation.candidates])


def unique_names(models: Sequence[ModelFile]) -> tuple[str, ...]:
    """Each model's variant where no other of them has it, else its label; of one file what its types differ in."""
    types = [model.stored_types.split(", ") for model in models]
    if len(types) > 1 and types[0][0] and len({model.path for model in models}) == 1:
        apart = [[each for each in some if not all(each in other for other in types)] for some in types]
        return tuple(map(", ".join, apart))
    counts = Counter(model.variant for model in models)
    return tuple(
        model.variant if counts[model.variant] == 1 and model.recipe else model.label for model in models
    )


def named_candidates(evaluation: Evaluation) -> list[tuple[str, Candidate]]:
    """Each candidate behind its short name."""
    return list(zip(short_names(evaluation), evaluation.candidates, strict=True))


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


def value_and_interval(key: str, figure: Figure, column: Style | None = None) -> tuple[str, str | None]:
    """A figure and its interval, in words."""
    kind = FIGURES[key]
    return shown(kind, figure, column), interval(kind, figure, column)


def listed(names: Sequence[str]) -> str:
    """``a, b and c``; nothing where there are none."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "nothing"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


_ABSOLUTE = re.compile(r"([\w-]*=)?/.*/([^/]+/?)", re.DOTALL)


def shortened_path(path: str) -> str:
    """An absolute path as ``…/NAME``, since a report may be passed on; any other, and ``KEY=PATH``, alike."""
    found = _ABSOLUTE.fullmatch(path)
    return f"{found[1] or ''}…/{found[2]}" if found else path


def shortened_command(command: str) -> str:
    """A command with its absolute paths shortened."""
    try:
        words, plain = shlex.split(command), re.compile(r"[\w@%+=:,./…-]+")
    except ValueError:  # not a shell's
        words, plain = command.split(" "), re.compile(".*", re.DOTALL)
    shorter = [shortened_path(word) for word in words]
    if shorter == words:
        return command
    return " ".join(word if plain.fullmatch(word) else shlex.quote(word) for word in shorter)
