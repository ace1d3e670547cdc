"""The base of all errors that a user can correct, and short texts of values for their messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

# Names and values come from files of any size. Lists that this project itself prints are shorter than this.
_MOST_CHARACTERS = 800
_MOST_LINES = 8
_MOST_LETTERS = 100  # that are compared with known names


class BambaQuantError(Exception):
    """Bad input: what is wrong, where, what was found, what was expected, how to fix it.

    The text is shortened; the attributes keep the full values. Only the command line turns the error into an exit code.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("fix", self.fix),
        ]
        return "\n".join(
            [
                _bounded(self.what),
                *(f"  {label}: {_bounded(value)}" for label, value in parts if value is not None),
            ]
        )


class ConfigError(BambaQuantError):
    """A configuration that is incomplete, contradicts itself, or asks for mathematics that is not implemented."""


def repr_short(value: Any) -> str:
    """``repr`` of a value of any type and size, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return (
            f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean q4_k_m?": the names in ``known`` that are closest to what a user wrote, else "".

    Upper case, spaces and the signs - _ . do not count, and names that differ in nothing else come alone. The text
    goes to the end of an error's first line.
    """
    by_letters: dict[str, str] = {}
    for each in known:
        by_letters.setdefault(_letters(each), each)
    wanted = _letters(name[:_MOST_LETTERS])
    close = [wanted] if wanted in by_letters else difflib.get_close_matches(wanted, by_letters)
    return f"; did you mean {' or '.join(by_letters[each] for each in close)}?" if close else ""


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "-_. ")


def _bounded(value: object) -> str:
    """``str(value)`` within the limits; lines after the first are indented deeper than the labels of an error."""
    try:
        text = str(value)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists nested as deep
        text = f"a value that cannot be printed ({error})"
    lines = text.split("\n", _MOST_LINES)[:_MOST_LINES]
    kept = "\n".join(lines)[:_MOST_CHARACTERS]
    left = len(text) - len(kept)
    return kept.replace("\n", "\n    ") + (f"… ({left:,} more characters)" if left else "")
