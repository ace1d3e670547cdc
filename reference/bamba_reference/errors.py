"""The one exception that every layer of this distribution raises for what a user can fix, and the reference's own."""

from __future__ import annotations

# Names and values come from files of any size. Lists that this project itself prints are shorter than this.
_MOST_CHARACTERS = 800
_MOST_LINES = 8


class BambaQuantError(Exception):
    """Bad input, named: what is wrong, where, what was found, what was expected, what to do.

    Its text is bounded, whatever the parts hold; ``found`` and the other attributes keep them whole. Only the command
    line turns it into an exit code; a library caller may catch it whole or by subclass.
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
                _shown(self.what),
                *(f"  {label}: {_shown(value)}" for label, value in parts if value is not None),
            ]
        )


class ConfigError(BambaQuantError):
    """A configuration that is incomplete, contradicts itself, or asks for mathematics that is not implemented."""


def _shown(value: object) -> str:
    """``value`` in bounds; lines after its first stand deeper than the labels, so that none can pass for a part."""
    try:
        text = str(value)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists nested as deep
        text = f"a value that cannot be shown ({error})"
    lines = text.split("\n", _MOST_LINES)[:_MOST_LINES]
    kept = "\n".join(lines)[:_MOST_CHARACTERS]
    left = len(text) - len(kept)
    return kept.replace("\n", "\n    ") + (f"… ({left:,} more characters)" if left else "")
