"""The ``bamba-quant`` command: its subcommands, and how errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from bamba_quant import __version__
from bamba_quant_cli import (
    allocate,
    compare,
    convert,
    demo,
    evaluate,
    export,
    fp4,
    fp8,
    generate,
    history,
    imatrix,
    inspect,
    int4,
    interrupts,
    lm_eval,
    perplexity,
    processes,
    quantize,
    recipes,
    repair,
)
from bamba_quant_cli.commands import Command, Commands, LongCommand
from bamba_quant_cli.console import echo, echo_lines, prepare

_BROKEN_PIPE = 141  # 128 + SIGPIPE, which ends other tools then

app = typer.Typer(
    name="bamba-quant",
    cls=Commands,
    help="Turn hybrid Mamba-2/attention checkpoints (Bamba and its family) into GGUF files that llama.cpp runs "
    "exactly, and into FP8, int4 and FP4 directories for transformers and vLLM.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS = {
    "Convert and quantize": (convert, quantize, fp8, int4, fp4, export, repair),
    "Calibrate": (imatrix, allocate, recipes),
    "Measure and run": (inspect, evaluate, history, perplexity, compare, generate, demo),
}
for _panel, _modules in _PANELS.items():
    for _module in _modules:
        _name = _module.__name__.rpartition(".")[2]
        _class = LongCommand if _module in (convert, quantize, fp8, int4, fp4) else Command
        app.command(_name, cls=_class, epilog=_module.EXAMPLES, rich_help_panel=_panel)(
            getattr(_module, _name)
        )
# Its arguments are the harness'.
app.command("lm-eval", epilog=lm_eval.EXAMPLES, rich_help_panel="Measure and run", **lm_eval.SETTINGS)(
    lm_eval.lm_eval
)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"bamba-quant {__version__}")
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
    """Run the command line, and end the process with its exit code."""
    interrupts.run(run)


def run() -> None:
    """Run the command line; exit code 2 for bad input or usage, 141 for an output that nobody reads any more."""
    _open_closed_streams()
    prepare()
    try:
        _run()
    except BrokenPipeError:
        _abandon(1, 2)
        sys.exit(_BROKEN_PIPE)
    except OSError:  # of stderr, to which the reason could not be written
        _abandon(1, 2)
        sys.exit(2)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # which typer turns into exit code 1
            _abandon(1, 2)
            sys.exit(_BROKEN_PIPE)
        raise


def _run() -> None:
    from bamba_quant.inference.distributed import FailedElsewhereError
    from bamba_reference.errors import BambaQuantError

    try:
        with interrupts.preserve_interrupt():
            app()
    except BrokenPipeError:
        raise
    except OSError as error:  # of stdout, or of a file no layer below has a better word for
        echo(f"error: {error.strerror or error}: {error.filename or 'standard output'}", err=True)
        _abandon(1)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extras = {"torch": "'bamba-quant[torch]'", "triton": "triton"}
        extras |= dict.fromkeys(("lm_eval", "jinja2", "datasets"), "'bamba-quant[lm-eval]'")
        if error.name not in extras:
            raise
        fix = f"pip install {extras[error.name]}"
        echo_lines(f"error: this needs {error.name}, which is not installed\n  fix: {fix}", err=True)
        sys.exit(2)
    except FailedElsewhereError:
        sys.exit(processes.code_elsewhere())
    except BambaQuantError as error:
        echo_lines(f"error: {error}", err=True)
        sys.exit(2)


def _open_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed: else the next file that is opened would take its number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(_null(number), mode))


def _null(number: int) -> int:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)
    return number


def _abandon(*streams: int) -> None:
    """So that the interpreter does not try again, on its way out, to write what could not be written."""
    for number in streams:
        _null(number)
