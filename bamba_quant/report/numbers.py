"""Figures in words, with as many digits as their intervals justify and no more."""

from __future__ import annotations

import math

from bamba_quant.evaluation.result import Figure, FigureKind

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


def uncertain(value: float, half_width: float | None) -> str:
    """``value`` down to the second digit of its uncertainty; four digits where none is known."""
    if half_width is None or half_width <= 0:
        return digits(value, 4)
    place = _exponent(half_width, 2) - 1  # power of ten of the last digit that says something
    if value != 0 and max(abs(value), half_width) < 1e-4:
        top = max(_exponent(value, 1), _exponent(half_width, 2))
        return f"{_written(round(value / 10.0**top, top - place), top - place)}e{top}"
    return _written(value, max(-place, 0)) if place < 0 else f"{value:.0f}"


def shown(kind: FigureKind, figure: Figure) -> str:
    """A figure's value as the report shows it, percent figures times 100 and with their sign."""
    scale = 100.0 if kind.percent else 1.0
    words = uncertain(figure.value * scale, _half_width(figure, scale))
    return f"{words} %" if kind.percent else words


def interval(kind: FigureKind, figure: Figure) -> str | None:
    """The 95 % interval to the same digits, such as ``0.0278 … 0.0302``; None where there is none."""
    if figure.low is None or figure.high is None:
        return None
    scale = 100.0 if kind.percent else 1.0
    half = _half_width(figure, scale)
    return f"{uncertain(figure.low * scale, half)} … {uncertain(figure.high * scale, half)}"


def bound(kind: FigureKind, value: float, figure: Figure) -> str:
    """A gate's bound, to one digit more than the figure so that it does not round onto its limit."""
    scale = 100.0 if kind.percent else 1.0
    half = _half_width(figure, scale)
    words = uncertain(value * scale, half / 10 if half else None)
    return f"{words} %" if kind.percent else words


def limit(kind: FigureKind, value: float) -> str:
    return f"{plain(round(value * 100, 10))} %" if kind.percent else plain(value)


def floor(kind: FigureKind, value: float | None) -> str | None:
    """A noise floor, of which only the first two digits mean anything."""
    if value is None:
        return None
    words = digits(value * (100 if kind.percent else 1), 2)
    return f"{words} %" if kind.percent else words


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def seconds(value: float) -> str:
    if value < 1:
        return f"{digits(value * 1000, 2)} ms"
    return f"{digits(value, 3)} s" if value < 100 else f"{value / 60:.1f} min"


def label(kind: FigureKind) -> str:
    """llama-perplexity's name without the blanks that align it there."""
    return " ".join(kind.label.split())


def _half_width(figure: Figure, scale: float) -> float | None:
    if figure.low is None or figure.high is None:
        return None
    return (figure.high - figure.low) / 2 * scale


def _exponent(value: float, count: int) -> int:
    """The power of ten of the first digit once ``value`` is rounded to ``count`` digits: of 9.99 to two, 1."""
    return 0 if value == 0 else int(f"{value:.{count - 1}e}".split("e")[1])


def _scientific(value: float, decimals: int) -> str:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _written(value: float, decimals: int) -> str:
    words = f"{value:.{decimals}f}"
    return (
        words.removeprefix("-")
        if math.copysign(1, value) < 0 and not any(c in "123456789" for c in words)
        else words
    )
