"""A history as a page with the report's looks."""

from __future__ import annotations

from bamba_quant.report import wording
from bamba_quant.report.charts.history import history_chart
from bamba_quant.report.history import RULE, History, rows
from bamba_quant.report.page import as_page, every_width, figure
from bamba_quant.report.tables import TableCell, table


def history_page(history: History) -> str:
    """The whole HTML document: the picture, and the table that says the same."""
    newest, name = history.reports[-1], wording.label(history.kind)
    cells = [
        [
            TableCell(file, f"{step.report.date}, {step.report.version}", words=True),
            TableCell(value, interval, step.found.figure.value),
            TableCell(step.change, words=True),
            TableCell(wording.size(step.found.model.file_bytes), value=step.found.model.file_bytes),
        ]
        for file, step, value, interval in rows(history)
    ]
    return as_page(
        f"{name} over {wording.counted(len(history.reports), 'report')}",
        f"Against {newest.base.label}, on {newest.text.scored:,} tokens of {newest.text.file}.",
        (
            figure(
                every_width(lambda width: history_chart(history, width)),
                "Upright lines are 95 % intervals. A line is broken where text, base or settings changed: figures "
                "before and after cannot be compared. Divergences below the noise floor are not drawn.",
            ),
            table(
                f"Every file in every report. {RULE}",
                ("file", name, "change", "size"),
                cells,
                class_="summary",
            ),
        ),
    )
