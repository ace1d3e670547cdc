"""An evaluation on one screen: the verdict, one table as wide as the terminal, a picture, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bamba_quant_cli.console import echo, is_terminal, print_table
from bamba_quant_cli.evaluation_tables import gate_lines, print_tasks, print_worst
from bamba_quant_cli.terminal import can_show, echo_wrapped, terminal_size

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Evaluation

_LEAST_NAME = 8  # characters of a name that is shortened for a narrow terminal
_MOST_REMEDIES = 2
_CHART_HEIGHT, _LEAST_CHART_WIDTH = 13, 60
# A column: its header, a cell for the base and for each candidate, and how early it gives way to a narrow terminal.
_Column = tuple[str, list[str], int]


def print_screen(evaluation: Evaluation, *, full: bool = False) -> None:
    """What was run, the verdict, a row a file, the picture on a terminal, and how to mend files that failed.

    With ``full`` gates that failed and remedies are left to ``evaluation_tables.print_details``.
    """
    from bamba_quant.report.frontier import frontier_lines
    from bamba_quant.report.verdict import verdict
    from bamba_quant.report.wording import named_candidates

    text = evaluation.text
    echo_wrapped(
        f"{text.file}: {text.chunks} chunks of {text.ctx} tokens, {text.scored:,} scored; "
        f"{evaluation.timing.seconds:.1f}\u00a0s"
    )
    echo()
    found, frontier = verdict(evaluation), frontier_lines(evaluation)
    if found.state != "none":
        echo_wrapped(found.headline, style="green" if found.state == "pass" else "red")
    for name, candidate in named_candidates(evaluation):
        for line in [] if full else gate_lines(candidate, failed=True, name=name):
            echo_wrapped(f"  {line.removeprefix('FAIL ')}")
    for line in frontier:
        echo_wrapped(line)
    if found.state != "none" or frontier:
        echo()
    width, lines = terminal_size()
    _print_table(evaluation, width)
    if is_terminal() and can_show("●○│") and width >= _LEAST_CHART_WIDTH and len(evaluation.candidates) > 1:
        from bamba_quant.report.charts.terminal import size_divergence_text

        echo()
        for line in size_divergence_text(evaluation, min(width, 100), min(_CHART_HEIGHT, max(8, lines // 2))):
            echo(line)
    if evaluation.tasks:
        print_tasks(evaluation)
    if not full:
        failed = [candidate for candidate in evaluation.candidates if not candidate.passed]
        for candidate in failed[:_MOST_REMEDIES] or (
            evaluation.candidates if len(evaluation.candidates) == 1 else ()
        ):
            print_worst(evaluation, candidate)


def _print_table(evaluation: Evaluation, width: int) -> None:
    columns = _columns(evaluation)
    chosen = {number for number, (_, _, rank) in enumerate(columns) if not rank}
    for number in sorted(set(range(len(columns))) - chosen, key=lambda number: columns[number][2]):
        if _width([columns[i] for i in (*chosen, number)]) <= width:
            chosen.add(number)
    shown = [columns[number] for number in sorted(chosen)]
    names = next(number for number, column in enumerate(shown) if column[0] == "file")
    if (over := _width(shown) - width) > 0:
        header, (base, *cells), rank = shown[names]
        most = max(_LEAST_NAME, max(map(len, (base, *cells))) - over)
        shown[names] = (
            header,
            [base if len(base) <= most else "base", *(_shortened(cell, most) for cell in cells)],
            rank,
        )
    ppl = next(cells[0] for header, cells, _ in columns if header == "PPL")
    if all(header != "PPL" for header, _, _ in shown):
        for header, cells, _ in shown:
            if header == "PPL ratio":
                cells[0] = f"PPL {ppl}"
    print_table(
        [header for header, _, _ in shown],
        list(zip(*(cells for _, cells, _ in shown), strict=True)),
        right=range(names + 1, len(shown)),
    )


def _width(columns: Sequence[_Column]) -> int:
    return sum(max(map(len, (header, *cells))) for header, cells, _ in columns) + 2 * (len(columns) - 1)


def _columns(evaluation: Evaluation) -> list[_Column]:
    """All columns: the base first, then the candidates from the smallest file to the largest."""
    from bamba_quant.evaluation.result import FIGURES
    from bamba_quant.report.charts.terminal import marks
    from bamba_quant.report.wording import by_size, column_style, gate_word, short_names, value_and_interval

    evaluation = by_size(evaluation)
    candidates = evaluation.candidates
    models = [evaluation.base, *(candidate.model for candidate in candidates)]

    def shown(key: str) -> list[tuple[str, str | None]]:
        figures = [candidate.figures[key] for candidate in candidates]
        style = column_style(FIGURES[key], figures)
        return [value_and_interval(key, figure, style) for figure in figures]

    def values(key: str) -> list[str]:
        return ["", *(value for value, _ in shown(key))]

    verdicts = [
        next((gate_word(gate) for gate in candidate.gates if not gate.passed), "pass")
        if candidate.gates
        else ""
        for candidate in candidates
    ]
    columns: list[_Column] = [
        ("", ["", *marks(evaluation)], 0),
        ("file", [f"{evaluation.base.label} (base)", *short_names(evaluation)], 0),
        ("size", _sizes([model.file_bytes for model in models]), 0),
        ("bits/weight", [f"{bits:.2f}" if (bits := model.bits_per_weight) else "" for model in models], 3),
        ("mean KLD", values("kld_mean"), 0),
        ("95 % interval", ["", *(interval or "" for _, interval in shown("kld_mean"))], 1),
        ("99.9 % KLD", values("kld_99_9"), 4),
        ("PPL", [shown("ppl_base")[0][0], *values("ppl")[1:]], 2),
        ("PPL ratio", values("ppl_ratio"), 0),
        ("same top", values("same_top"), 0),
        ("top-5 overlap", values("top_5_overlap"), 5),
        ("gates", ["", *verdicts], 0),
    ]
    left_out = {"gates"} if not any(verdicts) else set()
    if len(candidates) < 2 or not can_show("●○"):
        left_out.add("")
    return [column for column in columns if column[0] not in left_out]


def _sizes(sizes: Sequence[int]) -> list[str]:
    """All in the unit of the largest."""
    power = min(4, (len(str(max(sizes))) - 1) // 3)
    scaled = [n_bytes / 1000**power for n_bytes in sizes]
    decimals = 0 if not power else 1 if min(scaled) >= 10 else 2
    return [f"{value:.{decimals}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" for value in scaled]


def _shortened(name: str, most: int) -> str:
    """The name without its middle, since names differ at their ends."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[len(name) - half :]}"
