"""``bamba-quant history``: one figure of every file over several reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import echo, print_json, print_table
from bamba_quant_cli.interrupts import announce_outputs

if TYPE_CHECKING:
    from bamba_quant.report.history import Measured

EXAMPLES = """
Examples:

  bamba-quant history reports/*/report.json

  bamba-quant history report-0.1.0 report-0.2.0 -o history.html

  bamba-quant history reports/* --figure ppl_ratio -o history.svg --overwrite

  bamba-quant history previous/report.json report/report.json --fail-if-worse
"""


def history(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT…", help="report.json files of evaluate, or directories that hold one."
        ),
    ],
    figure: Annotated[
        str,
        typer.Option(metavar="NAME", help="Figure to show, by its name in report.json, such as ppl_ratio."),
    ] = "kld_mean",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Draw it: an .html page or an .svg picture."),
    ] = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse",
            help="Exit code 1 if a file of the newest report is worse than in the report before: "
            "their 95 % intervals do not overlap.",
        ),
    ] = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Compare the reports of several evaluations: how a figure of each file changed from date to date.

    Reports are ordered by date. Files are matched by type, or by name if a report has a type twice. Figures on
    different texts, bases or settings are shown but not compared.
    """
    from bamba_quant.errors import OutputError
    from bamba_quant.report.charts.history import history_chart
    from bamba_quant.report.history import RULE, plain, read_history, rows, worse
    from bamba_quant.report.history_page import history_page
    from bamba_quant.report.page import as_svg
    from bamba_quant.report.wording import label
    from bamba_quant.writers.atomic import write_text

    announce_outputs(output)
    if output is not None and output.suffix not in (".svg", ".html"):
        raise OutputError("a history is drawn as an .svg or an .html file", found=output.name)
    read = read_history(reports, figure)
    if output is not None:
        drawn = history_page(read) if output.suffix == ".html" else as_svg(history_chart(read, 900.0))
        write_text(output, drawn, overwrite=overwrite, inputs=[report.path for report in read.reports])
    if as_json:
        print_json(plain(read))
    else:
        echo(f"{label(read.kind)} over {len(read.reports)} reports")
        echo()
        cells = [
            (name, step.report.date, step.report.version, value, interval or "", step.change)
            for name, step, value, interval in rows(read)
        ]
        print_table(("file", "date", "version", "value", "95 % interval", "change"), cells, right=(3, 4))
        if len(read.reports) > 1:
            echo()
            echo(RULE)
    if output is not None:
        echo(output, err=as_json)
    if fail_if_worse and (found := worse(read)):
        for name, step in found:
            now, before = (_words(figure, each) for each in (step.found, step.before) if each)
            echo(f"WORSE {name}: {label(read.kind)} {now}, before {before}", err=True)
        raise typer.Exit(1)


def _words(key: str, found: Measured) -> str:
    from bamba_quant.report.wording import value_and_interval

    value, interval = value_and_interval(key, found.figure)
    return f"{value} ({interval})" if interval else value
