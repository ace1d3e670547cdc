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
from contextlib import ExitStack
from typing import Any, ClassVar, Self, TextIO

from bamba_quant.errors import BambaQuantError
from bamba_quant.printable import printable, printable_json

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BEFORE_RATES = 1.0  # a rate of less time says little
_COMPILING = "compiling kernels (once on this machine)"
_STYLES = {"red": "1;31", "green": "1;32"}
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


def echo(line: object = "", *, err: bool = False, style: str = "") -> None:
    """One line; what would end it earlier is escaped too. ``style`` is one of ``_STYLES``, for a terminal."""
    stream, text = sys.stderr if err else sys.stdout, printable(str(line), keep="")
    if style and is_terminal() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        text = f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
    _write(stream, text + "\n")


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return bool(sys.stdout and sys.stdout.isatty())


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

    A context manager that removes the bar at its end. Nothing is printed before the first call. ``total`` of work
    counted in bytes is given here, of steps at each update. Unless it is ``hidden``, kernels that are compiled
    meanwhile are announced, and the time that takes counts for no rate and no time left.
    """

    _shown: ClassVar[Progress | None] = None  # the one on the terminal

    def __init__(self, doing: str, total: int = 0, *, hidden: bool = False) -> None:
        self._doing, self._total, self._hidden = doing, total, hidden
        self._done, self._first, self._part = 0, 0.0, 0.0
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        self._detail = ""
        self._listening = ExitStack()

    def __enter__(self) -> Self:
        from bamba_reference.runtime import compilation

        if not self._hidden:
            self._listening.enter_context(compilation.listen(self._compiling, self._after_compiling))
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.close()
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar, Progress._shown = None, None

    def say(self, doing: str) -> None:
        """Begin a stage without steps, on a terminal."""
        self._doing, self._total = doing, 0
        if _on_terminal() and not self._hidden:
            self._show_bar(doing, "")

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are done."""
        self._done += n_bytes
        now = time.monotonic()
        rate = self._done / max(1e-9, now - self._started)
        if _on_terminal():
            detail = f"{size(self._done)} of {size(self._total)}"
            if self._done and now - self._started > _SECONDS_BEFORE_RATES:
                detail += f", {size(rate)}/s, {_time((self._total - self._done) / rate)} left"
            self._show_bar(self._doing, detail)
        elif self._is_due(now):
            percent = 100 * self._done // max(1, self._total)
            done = f"{percent} % ({size(self._done)} of {size(self._total)}, {size(rate)}/s)"
            echo(f"{self._doing}: {done}", err=True)

    def update(
        self,
        done: int,
        total: int,
        detail: str = "",
        *,
        doing: str | None = None,
        work: float | None = None,
        seconds_left: float | None = None,
        print_now: bool = False,
    ) -> None:
        """``done`` of ``total`` steps, with further text for the line; a new ``doing`` begins a new stage.

        ``seconds_left`` is estimated, if it is not given, from ``work``, the part of all stages' work that is done, or
        from this stage's steps. ``print_now`` prints a line however short the time since the last one is.
        """
        now, part = time.monotonic(), done / max(1, total) if work is None else work
        if (doing or self._doing) != self._doing or not self._total:
            self._doing = doing or self._doing
            self._printed = now
            if work is None or not self._total:
                self._started, self._first = now, part
        if part < self._part:  # a second run begins
            self._started, self._first = now, part
        self._part = part
        self._done, self._total = done, total
        if seconds_left is None and self._first < part < 1 and now - self._started > _SECONDS_BEFORE_RATES:
            seconds_left = (now - self._started) / (part - self._first) * (1 - part)
        left = "" if seconds_left is None else f", {_time(seconds_left)} left"
        if _on_terminal():
            # What is left comes first: a narrow terminal cuts the end.
            self._show_bar(self._doing, f"{done:,}/{total:,}{left}{detail}")
        elif print_now or self._is_due(now):
            self._printed = now
            echo(f"{self._doing} {done:,} of {total:,}{detail}{left}", err=True)
        if done == total:
            self.close()

    def _is_due(self, now: float) -> bool:
        """Whether some seconds have passed since the last line; then this is the last line."""
        due = now - self._printed >= _SECONDS_BETWEEN_LINES
        self._printed = now if due else self._printed
        return due

    def _compiling(self) -> None:
        if (Progress._shown or self) is not self:
            return
        if _on_terminal():
            self._show_bar(_COMPILING, "")
        elif self._is_due(time.monotonic()):
            echo(_COMPILING, err=True)

    def _after_compiling(self, seconds: float) -> None:
        self._started += seconds
        if self._bar:
            self._show_bar(self._doing, self._detail)

    def _show_bar(self, doing: str, detail: str) -> None:
        if not self._bar:
            from rich import progress
            from rich.console import Console
            from rich.table import Column

            console, rest = Console(stderr=True), Column(ratio=1, no_wrap=True)
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(max(8, min(40, console.width // 4))),
                progress.TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
                console=console,
                transient=True,
                expand=True,
                redirect_stdout=False,
            )
            self._bar.add_task("")
        (task,) = self._bar.task_ids
        if doing != _COMPILING:
            self._detail = detail
        known = self._total if doing != _COMPILING and self._total else None
        Progress._shown = self
        new, shown = self._bar.tasks[0].description != doing, printable(detail, keep="")
        self._bar.update(task, description=doing, completed=self._done, total=known, detail=shown)
        self._bar.start()  # does nothing where it is shown already
        if new:  # drawn at once: compiling lets no other thread run, which would draw it
            self._bar.refresh()


def _on_terminal() -> bool:
    return bool(sys.stderr and sys.stderr.isatty())


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
