"""Text that fits the terminal it is printed on."""

from __future__ import annotations

import shutil
import sys
import textwrap

from bamba_quant.printable import printable
from bamba_quant_cli.console import echo

_PIPE = (120, 40)


def echo_wrapped(text: str, *, style: str = "") -> None:
    """A sentence in lines that fit the terminal, indented after the first as the first is, and two more."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    for line in textwrap.wrap(
        printable(text, keep=""),
        terminal_size()[0],
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ):
        echo(line, style=style)


def terminal_size() -> tuple[int, int]:
    """Columns and lines, by COLUMNS and LINES where they are set; elsewhere than on a terminal ``_PIPE``."""
    size = shutil.get_terminal_size(_PIPE)
    return size.columns, size.lines


def can_show(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
