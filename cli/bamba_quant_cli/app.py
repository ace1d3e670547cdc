"""The ``bamba-quant`` command: its subcommands, and how errors become messages and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from bamba_quant_cli import (
    compare,
    convert,
    demo,
    evaluate,
    export,
    fp8,
    generate,
    inspect,
    int4,
    perplexity,
    processes,
    repair,
)
from bamba_quant_cli.console import Commands, echo, echo_lines, prepare

app = typer.Typer(
    name="bamba-quant",
    cls=Commands,
    help="Turn hybrid Mamba-2/attention checkpoints (Bamba and its family) into GGUF files that llama.cpp runs "
    "exactly, and into FP8 and int4 directories for transformers and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("fp8", epilog=fp8.EXAMPLES)(fp8.fp8)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("int4", epilog=int4.EXAMPLES)(int4.int4)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("repair", epilog=repair.EXAMPLES)(repair.repair)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("perplexity", epilog=perplexity.EXAMPLES)(perplexity.perplexity)
app.command("evaluate", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(f"bamba-quant {version('bamba-quant')}")
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
    """Run the command line; exit code 2 for bad input or usage. Typer itself makes 130 of an interrupt."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _terminate)
    prepare()
    from bamba_quant.ranks import FailedElsewhereError
    from bamba_reference.errors import BambaQuantError

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of stdout, or of a file no layer below has a better word for
        echo(f"error: {error.strerror or error}: {error.filename or 'standard output'}", err=True)
        _abandon_stdout()
        sys.exit(2)
    except FailedElsewhereError:
        sys.exit(processes.code_elsewhere())
    except BambaQuantError as error:
        echo_lines(f"error: {error}", err=True)
        sys.exit(2)


def _abandon_stdout() -> None:
    """So that the interpreter does not try again, on its way out, to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)
