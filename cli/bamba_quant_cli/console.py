"""All that commands print: lines, errors, tables, JSON and progress, in which no text from outside acts on a terminal.

Names and values come from files. Every character of them that cannot be seen (control characters, escape sequences,
marks that turn the reading direction) is printed as its code, wherever the output goes; only the text that a model
generates is written as it is, unless it goes to a terminal.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from bamba_quant.errors import BambaQuantError
from bamba_quant.printable import printable, printable_json

# Which typer has from click, or brings along, by its version.
_UsageError: Any = typer.BadParameter.__base__
_SECONDS_BETWEEN_LINES = 5.0
# A cell that is longer is printed whole, but the column is not made as wide for it.
_WIDEST_COLUMN = 100
# Marks for the direction of one neighbour, which texts in Hebrew and Arabic are written with.
_KEPT_IN_TEXT = "\n\t\u200e\u200f\u061c"


def prepare() -> None:
    """Have whatever is printed arrive: in an encoding that lacks a character, its code is written in its place."""
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


def echo_progress(line: str, last: bool) -> None:
    """To stderr: on a terminal over the progress line before, and kept if it is the ``last``; else as any line."""
    if sys.stderr and sys.stderr.isatty():
        _write(sys.stderr, f"\r\x1b[K{printable(line, keep='')}" + "\n" * last)
    else:
        echo(line, err=True)


def _write(stream: TextIO | None, text: str) -> None:
    """Not by typer's ``echo``, which takes escape sequences out and writes UTF-8 where ASCII is asked for."""
    if stream is not None:  # as it is where the descriptor was closed
        stream.write(text)
        stream.flush()  # so that what cannot be written is an error here


class Commands(TyperGroup):
    """The group of all subcommands; errors of usage, which typer prints, show the user's words as codes too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _visible_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _visible_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


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
    header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()
) -> None:
    """Columns as wide as their widest cell, those in ``right`` flush right; never cut, so it can be piped."""
    cells = [[printable(str(cell), keep="") for cell in row] for row in (header, *rows)]
    widths = [min(_WIDEST_COLUMN, max(len(row[column]) for row in cells)) for column in range(len(header))]
    for number, row in enumerate(cells):
        line = "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        echo(line.rstrip())
        if number == 0:
            echo("  ".join("-" * width for width in widths))


@contextmanager
def progress(total: int, doing: str) -> Iterator[Callable[[int], None]]:
    """A function that is told bytes done: a bar with bytes and rate on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Rate

        columns = (TextColumn(doing), BarColumn(), DownloadColumn(), Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda n_bytes: bar.advance(task, n_bytes)
        return
    started = told = time.monotonic()
    done = 0

    def tell(n_bytes: int) -> None:
        nonlocal done, told
        done += n_bytes
        now = time.monotonic()
        if now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            echo(
                f"{doing}: {100 * done // max(1, total)} % ({size(done)} of {size(total)}, "
                f"{size(done / (now - started))}/s)",
                err=True,
            )

    yield tell
