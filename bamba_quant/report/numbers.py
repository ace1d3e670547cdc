"""Figures in words, with as many digits as their intervals justify and no more."""

from __future__ import annotations

from dataclasses import dataclass

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
    if below_floor(kind, figure):
        return f"< {floor(kind, figure.floor)}"
    return _with_sign(kind, _style(kind, figure)(figure.value * _scale(kind)))


def interval(kind: FigureKind, figure: Figure) -> str | None:
    """The 95 % interval to the same digits, such as ``0.0278 … 0.0302``; None where there is none."""
    if figure.low is None or figure.high is None or below_floor(kind, figure):
        return None
    write, scale = _style(kind, figure), _scale(kind)
    return f"{write(figure.low * scale)} … {write(figure.high * scale)}"


def below_floor(kind: FigureKind, figure: Figure) -> bool:
    """Whether a figure that is zero when nothing is lost lies nearer to it than noise does."""
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
    """A noise floor, of which only the first two digits mean anything."""
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
