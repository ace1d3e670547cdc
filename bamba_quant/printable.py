"""Text from outside made safe to show: what cannot be seen, or would act on a terminal, is written as its code."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sized
from dataclasses import fields, is_dataclass
from typing import Any

# Control characters, lone surrogates (of file names that are not UTF-8), marks that turn the reading direction, private
# use, and the separators that are line ends to some programs only.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Cf", "Co", "Zl", "Zp"})
# Joiners and the soft hyphen, which words are written with.
_HARMLESS = "\u200c\u200d\u00ad"
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_LONGEST = 120  # characters of a value in ``brief_repr``
_NOT_PLAIN = re.compile(r"[^\n -~]")


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with each character that cannot be seen or encoded, but for ``keep``, as its code: ``\\u202e``."""
    if text.isprintable():
        return text
    return "".join(_code(each) if _is_unsafe(each) and each not in keep else each for each in text)


def brief_repr(record: Any) -> str:
    """The ``repr`` of a dataclass in a few lines: collections by their length, records in it by their ``name``."""
    shown = (f"{each.name}={_brief(getattr(record, each.name))}" for each in fields(record) if each.repr)
    return f"{type(record).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if is_dataclass(value):
        return f"{type(value).__name__}({getattr(value, 'name', '…')})"
    if isinstance(value, Sized) and not isinstance(value, str):
        few = isinstance(value, tuple) and all(type(each) in (str, int, float) for each in value[:5])
        if not few or len(value) > 4:
            return f"<{type(value).__name__} of {len(value)}>"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def printable_json(text: str) -> str:
    """JSON text of which a parser reads the same, with all that ``printable`` replaces escaped."""
    return _NOT_PLAIN.sub(_json_code, text)


def _json_code(found: re.Match[str]) -> str:
    if not _is_unsafe(found[0]):
        return found[0]
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in _UNSAFE_CATEGORIES and character not in _HARMLESS


def _code(character: str) -> str:
    number = ord(character)
    return _SHORT.get(character) or (f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}")
