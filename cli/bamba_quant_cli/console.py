"""All that commands print: lines, errors, tables, JSON and progress, in which no text from outside acts on a terminal.

Names and values come from files. Every character of them that cannot be seen (control characters, escape sequences,
marks that turn the reading direction) is printed as its code, wherever the output goes; only the text that a model
generates is written as it is, unless it goes to a terminal.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, Self, TextIO

from bamba_quant.errors import BambaQuantError
from bamba_quant.printable import printable, printable_json

_SECONDS_BETWEEN_LINES = 5.0
# A cell that is longer is printed whole, but the column is not made as wide for it.
_WIDEST_COLUMN = 100
# Marks for the direction of one neighbour, which texts in Hebrew and Arabic are written with.
_KEPT_IN_TEXT = "\n\t\u200e\u200f\u061c"


def prepare() -> None:
    """Print a character that the output's encoding lacks as its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *about: echo_lines(f"warning: {message}", err=True)


def echo(line: object = "", *, err: bool = False) -> None:
    """One line; what would end it earlier is escaped too."""
    _write(sys.stderr if err else sys.stdout, printable(str(line), keep="") + "\n")


def echo_lines(text: object, *, err: bool = False) -> None:
    """Text of several lines, such as an error's."""
    for line in str(text).split("\n"):
        echo(line, err=err)


def echo_text(text: str) -> None:
    """A piece of what a model generates: as it is, or on a terminal without what would act on it."""
    _write(sys.stdout, printable(text, keep=_KEPT_IN_TEXT) if sys.stdout and sys.stdout.isatty() else text)


def _write(stream: TextIO | None, text: str) -> None:
    """Not ``typer.echo``, which removes escape sequences and writes UTF-8 to an ASCII stream."""
    if stream is not None:  # as it is where the descriptor was closed
        stream.write(text)
        stream.flush()  # so that what cannot be written is an error here


def size(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and Hugging Face count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def count(number: float) -> str:
    """A number of weights: 9.78 B, 43.1 M."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} B"


def print_json(value: Any) -> None:
    """One JSON value. Numbers that JSON lacks become the strings "nan", "inf" and "-inf", paths their text."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    try:
        text = json.dumps(_finite(value), indent=2, ensure_ascii=not utf8, allow_nan=False, default=str)
    except RecursionError:
        raise BambaQuantError(
            "a value is nested too deeply to be printed as JSON", fix="leave out --json"
        ) from None
    _write(sys.stdout, printable_json(text) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    dispensable: Sequence[int] = (),
) -> None:
    """Columns as wide as their widest cell, those in ``right`` flush right; never cut, so it can be piped.

    On a terminal that is too narrow, columns of ``dispensable`` are left out, the first one first, and named.
    """
    cells = [[printable(str(cell), keep="") for cell in row] for row in (header, *rows)]
    widths = [min(_WIDEST_COLUMN, max(len(row[column]) for row in cells)) for column in range(len(header))]
    shown, room, waiting = list(range(len(header))), terminal_width(), list(dispensable)
    while room and waiting and sum(widths[column] + 2 for column in shown) - 2 > room:
        shown.remove(waiting.pop(0))
    for number, row in enumerate(cells):
        line = "  ".join(
            row[column].rjust(widths[column]) if column in right else row[column].ljust(widths[column])
            for column in shown
        )
        echo(line.rstrip())
        if number == 0:
            echo("  ".join("-" * widths[column] for column in shown))
    if left_out := [name for column, name in enumerate(header) if column not in shown]:
        echo(f"(too narrow for: {', '.join(left_out)})")


def terminal_width() -> int:
    """Columns of the terminal that stdout is, or the variable COLUMNS; 0 for neither."""
    known = "COLUMNS" in os.environ or (sys.stdout and sys.stdout.isatty())
    return shutil.get_terminal_size((0, 0)).columns if known else 0


class Progress:
    """Progress of a command on stderr: a bar by rich on a terminal, elsewhere a line every few seconds.

    A context manager that removes the bar at its end. Nothing is printed before the first update. ``total`` of work
    counted ``in_bytes`` is given here, of steps at each update.
    """

    def __init__(self, doing: str, total: int = 0, *, in_bytes: bool = False) -> None:
        self._doing, self._total, self._in_bytes = doing, total, in_bytes
        self._done = self._first = 0
        self._started = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are done."""
        self._done += n_bytes
        self._show("")

    def update(
        self,
        done: int,
        total: int,
        detail: str = "",
        *,
        doing: str | None = None,
        seconds_left: float | None = None,
        print_now: bool = False,
    ) -> None:
        """``done`` of ``total`` steps, with further text for the line; a new ``doing`` begins a new stage.

        ``seconds_left`` is estimated from the steps so far if it is not given. ``print_now`` prints a line however
        short the time since the last one is.
        """
        if (doing or self._doing) != self._doing or not self._total:
            self._doing = doing or self._doing
            self._started = self._printed = time.monotonic()
            self._first = done
        self._done, self._total = done, total
        if seconds_left is None and done > self._first:
            seconds_left = (time.monotonic() - self._started) / (done - self._first) * (total - done)
        minutes, seconds = divmod(round(seconds_left or 0), 60)
        self._show(detail + (f", {minutes}:{seconds:02} left" if seconds_left is not None else ""), print_now)
        if done == total:
            self.close()

    def _show(self, detail: str, print_now: bool = False) -> None:
        if sys.stderr and sys.stderr.isatty():
            self._show_bar(printable(detail, keep=""))
            return
        now = time.monotonic()
        if not print_now and now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        if self._in_bytes:
            rate = size(self._done / max(1e-9, now - self._started))
            percent = 100 * self._done // max(1, self._total)
            echo(
                f"{self._doing}: {percent} % ({size(self._done)} of {size(self._total)}, {rate}/s)", err=True
            )
        else:
            echo(f"{self._doing} {self._done:,} of {self._total:,}{detail}", err=True)

    def _show_bar(self, detail: str) -> None:
        if not self._bar:
            from rich import progress
            from rich.console import Console
            from rich.table import Column

            bytes_done = (
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            rest = Column(ratio=1, no_wrap=True)
            steps_done = (
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
            )
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                *(bytes_done if self._in_bytes else steps_done),
                console=Console(stderr=True),
                transient=True,
                expand=True,
                redirect_stdout=False,
            )
            self._bar.add_task("")
        (task,) = self._bar.task_ids
        shown = detail.removeprefix(", ")
        self._bar.update(task, description=self._doing, completed=self._done, total=self._total, detail=shown)
        self._bar.start()  # does nothing where it is shown already
