"""The one exception every layer of this distribution raises for what a user can mend, and the reference's own kinds."""

from __future__ import annotations


class BambaQuantError(Exception):
    """Bad input, named: what is wrong, where, what was found, what was expected, what to do.

    Only the command line turns it into an exit code; a library caller may catch it whole or by subclass.
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
            ("to mend", self.fix),
        ]
        return "\n".join([self.what, *(f"  {label}: {value}" for label, value in parts if value is not None)])


class ConfigError(BambaQuantError):
    """A configuration that is incomplete, contradicts itself, or asks for mathematics that is not implemented."""
