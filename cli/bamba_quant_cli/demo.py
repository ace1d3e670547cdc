"""``bamba-quant demo``: the main job, done on the model that travels with the package."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli.console import print_table, size
from bamba_quant_cli.interrupts import leaves

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Candidate

EXAMPLES = """
Examples:

  bamba-quant demo

  bamba-quant demo --out /somewhere/else
"""

# Formats by the names of their recipes and schemes: GGUF, FP8, int4.
KINDS = ("bf16", "q8_0", "q4_k_m", "fp8-dynamic", "w4a16-g128")
_CONTEXT, _CHUNKS = 256, 32


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the files it makes.")] = Path("demo"),
) -> None:
    """Convert the embedded bamba-mini to GGUF, FP8 and int4, and report what each file lost against the original.

    The text is Python's own help; figures are llama-perplexity's, by the reference forward pass.
    """
    from bamba_quant.candidates import make_candidate
    from bamba_quant.embedded import embedded_model
    from bamba_quant.errors import OutputError
    from bamba_quant.evaluation.evaluate import evaluate
    from bamba_quant.evaluation.options import Options
    from bamba_quant.report import write_reports

    if out.exists() and not out.is_dir():
        raise OutputError("--out is there already and is no directory", where=out)
    leaves(lambda: f"the files made so far are in {out}" if out.is_dir() else "nothing written")
    out.mkdir(parents=True, exist_ok=True)
    source = embedded_model()
    files = []
    for kind in KINDS:
        files.append(make_candidate(source, kind, out))
        typer.echo(f"made {files[-1]}", err=True)
    text = out / "python-help.txt"
    text.write_text(help_text(), encoding="utf-8")
    typer.echo(f"evaluating on {_CHUNKS} chunks of {_CONTEXT} tokens of {text}", err=True)
    # As it was called: make demo runs it from an environment that is not activated.
    command = "bamba-quant" if shutil.which("bamba-quant") else sys.argv[0]
    again = [command, "evaluate", source, *files, "--text", text, "--ctx", _CONTEXT, "--chunks", _CHUNKS]
    evaluation = evaluate(
        source,
        files,
        text,
        Options(ctx=_CONTEXT, chunks=_CHUNKS),
        command=shlex.join(map(str, again)),
    )
    reports = write_reports(evaluation, out / "report")
    base = evaluation.base
    typer.echo(f"{base.label}: {base.weights:,} weights, trained for this project, {size(base.file_bytes)}\n")
    print_table(
        ("type", "size", "bits per weight", "PPL ratio", "mean KLD", "same top", "where"),
        [
            (*_row(candidate), path)
            for candidate, path in zip(evaluation.candidates, files, strict=True)
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    typer.echo("\nWith intervals, drift by layer and every tensor, in a browser:")
    typer.echo(f"  {reports.html}")
    typer.echo("\nThe GGUF files run in llama.cpp as they are, the directories in transformers. Try also:")
    smallest = shlex.quote(
        str(min(files, key=lambda path: path.stat().st_size if path.is_file() else 1 << 60))
    )
    typer.echo(f"  {shlex.quote(command)} inspect {smallest} --tensors")
    typer.echo(f'  {shlex.quote(command)} generate {smallest} --prompt "The function"')


def help_text() -> str:
    """Python's own help on its language, in the order of its topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[: 16 * _CONTEXT * _CHUNKS]


def _row(candidate: Candidate) -> tuple[str, ...]:
    from bamba_quant.evaluation.result import FIGURES
    from bamba_quant.report.numbers import shown

    bits = candidate.model.bits_per_weight
    return (
        candidate.model.recipe,
        size(candidate.model.file_bytes),
        f"{bits:.2f}" if bits else "",
        *(shown(FIGURES[key], candidate.figures[key]) for key in ("ppl_ratio", "kld_mean", "same_top")),
    )
