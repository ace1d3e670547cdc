"""File size against mean KL divergence in characters, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from bamba_quant.evaluation.result import FIGURES, Evaluation
from bamba_quant.report.charts.layout import Scale, linear, logarithmic, shortened
from bamba_quant.report.frontier import standings
from bamba_quant.report.wording import is_below_floor, plain, short_names, size

MARK, DOMINATED = "●", "○"
_LONGEST_NAME = 24
_TICK = 8  # characters of a number at the left axis


def marks(evaluation: Evaluation) -> list[str]:
    """Each candidate's mark: hollow where another one is not larger and diverges less."""
    return [DOMINATED if standing.state == "dominated" else MARK for standing in standings(evaluation)]


def size_divergence_text(evaluation: Evaluation, width: int, height: int) -> list[str]:
    """``height`` lines of at most ``width`` characters: a mark and a name a candidate, hollow if another beats it.

    Candidates that differ from the base by less than the noise floor stand in the lowest line, at 0.
    """
    candidates = evaluation.candidates
    klds = [candidate.figures["kld_mean"] for candidate in candidates]
    none = [kld.value <= 0 or is_below_floor(FIGURES["kld_mean"], kld) for kld in klds]
    sizes = [float(candidate.model.file_bytes) for candidate in candidates]
    columns, rows = width - _TICK - 2, height - 3
    y = logarithmic(
        [kld.value for kld, zero in zip(klds, none, strict=True) if not zero], rows - 1 - any(none), 0
    )
    x = (logarithmic if max(sizes) > 6 * min(sizes) else linear)(sizes, 0, columns - 1)
    points = [
        (round(x(n_bytes)), rows - 1 if zero else round(y(kld.value)))
        for n_bytes, kld, zero in zip(sizes, klds, none, strict=True)
    ]
    grid = [[" "] * columns for _ in range(rows)]
    for (column, row), mark in zip(points, marks(evaluation), strict=True):
        grid[row][column] = mark
    for point, name in zip(points, short_names(evaluation), strict=True):
        _write_name(grid, point, shortened(name, _LONGEST_NAME))
    ticks = {round(y(value)): plain(value) for value in y.ticks(max(2, rows // 3))}
    if any(none):
        ticks[rows - 1] = "0"
    lines = [
        f"{ticks.get(row, ''):>{_TICK}} {'┤' if row in ticks else '│'}{''.join(cells).rstrip()}"
        for row, cells in enumerate(grid)
    ]
    rule, below = _bottom(x, columns)
    legend = (
        f"{DOMINATED} another file is not larger and diverges less" if DOMINATED in marks(evaluation) else ""
    )
    return [f"{'mean KLD':>{_TICK}}  {legend}", *lines, f"{'':{_TICK}} └{rule}", f"{'':{_TICK}}  {below}"]


def _write_name(grid: list[list[str]], point: tuple[int, int], name: str) -> None:
    """Write ``name`` beside its point, at the first place that is free; nowhere if there is none."""
    for column, row in _places(*point, len(name)):
        inside = 0 <= row < len(grid) and column >= 0 and column + len(name) <= len(grid[0])
        around = range(max(0, column - 1), column + len(name) + 1)
        if inside and all(grid[row][i : i + 1] in ([" "], []) or (i, row) == point for i in around):
            grid[row][column : column + len(name)] = name
            return


def _places(column: int, row: int, length: int) -> Iterator[tuple[int, int]]:
    for up in (0, -1, 1, -2, 2):
        yield column + 2, row + up
        yield column - 1 - length, row + up
        if up:
            yield column - length // 2, row + up


def _bottom(x: Scale, columns: int) -> tuple[str, str]:
    """The axis with its marks, and the sizes below them."""
    rule, below = ["─"] * columns, ""
    for value in x.ticks(max(2, columns // 14)):
        place, text = round(x(value)), size(value)
        start = max(0, min(place - len(text) // 2, columns - len(text)))
        if start > len(below) or not below:
            rule[place] = "┬"
            below = f"{below:{start}}{text}"
    return "".join(rule), below
