"""HTML and SVG as text, in which nothing that came from outside can act as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from bamba_quant.printable import printable

_VOID = frozenset({"br", "hr", "input", "meta"})
Attribute = str | float | bool | None


class Markup(str):
    """Text that is markup already; ``element`` escapes every other string."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """``text`` as it may stand between tags and inside quoted attributes; ``Markup`` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text), quote=True))


def unbroken(text: str) -> str:
    """``text`` in which no line ends between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")


def breakable(text: str) -> Markup:
    """``text`` that may end a line before the parts of a long name; numbers stay whole."""
    return (
        Markup(re.sub(r"([./_-])(?=[^\W\d])", r"\1<wbr>", escaped(text))) if len(text) > 16 else escaped(text)
    )


def joined(parts: Iterable[str], separator: str = "") -> Markup:
    return Markup(escaped(separator).join(escaped(part) for part in parts))


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """One element. ``class_`` becomes class, ``aria_label`` aria-label; None and False omit an attribute."""
    opened = "".join([tag, *(_attribute(name, value) for name, value in attributes.items())])
    if tag in _VOID:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{joined(children)}</{tag}>")


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escaped(value if isinstance(value, str) else coordinate_text(value))}"'


def coordinate_text(number: float) -> str:
    """A coordinate to a hundredth, without trailing zeros."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number % 1 else f"{number:.0f}"
