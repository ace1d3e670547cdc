"""The ``bamba-quant`` command: its subcommands, and how errors become messages and exit codes."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from bamba_quant_cli import convert, demo, export, generate, inspect, perplexity, repair

app = typer.Typer(
    name="bamba-quant",
    help="Turn hybrid Mamba-2/attention checkpoints (Bamba and its family) into GGUF files that llama.cpp runs "
    "exactly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("repair", epilog=repair.EXAMPLES)(repair.repair)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("perplexity", epilog=perplexity.EXAMPLES)(perplexity.perplexity)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bamba-quant {version('bamba-quant')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the subcommand."""


def main() -> None:
    """Run the command line; exit code 2 for bad input or usage, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    from bamba_reference.errors import BambaQuantError

    try:
        app()
    except BambaQuantError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)
