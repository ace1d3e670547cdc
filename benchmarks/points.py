"""What was required of a figure and what was measured, as a table, and how one script hands it to another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One figure; ``held`` says whether ``measured`` is what ``required`` asks for, None that nothing was measured."""

    what: str
    required: str
    measured: str
    held: bool | None


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--points", type=Path, metavar="FILE", help="also write what was required and measured, as JSON"
    )


def write(points: Iterable[Point], file: Path | None) -> None:
    if file:
        file.write_text(json.dumps([asdict(point) for point in points], indent=1))


def read(file: Path) -> list[Point]:
    return [Point(**entries) for entries in json.loads(file.read_text())]


def table(points: Sequence[Point]) -> str:
    """A table in Markdown."""
    lines = ["| point | required | measured | |", "|---|---|---|---|"]
    for point in points:
        held = {True: "yes", False: "**no**", None: "not measured"}[point.held]
        lines.append(f"| {point.what} | {point.required} | {point.measured} | {held} |")
    return "\n".join(lines)
