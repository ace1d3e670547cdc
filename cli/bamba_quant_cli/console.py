"""What commands print with: sizes as people read them, tables, and progress that suits a terminal or a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

_SECONDS_BETWEEN_LINES = 5.0


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
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()
) -> None:
    """Columns as wide as their widest cell, those in ``right`` flush right; never cut, so it can be piped."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        line = "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        typer.echo(line.rstrip())
        if number == 0:
            typer.echo("  ".join("-" * width for width in widths))


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
            typer.echo(
                f"{doing}: {100 * done // max(1, total)} % ({size(done)} of {size(total)}, "
                f"{size(done / (now - started))}/s)",
                err=True,
            )

    yield tell
