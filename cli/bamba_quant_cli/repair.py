"""``bamba-quant repair``: puts the q and k rows of an existing Bamba GGUF where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json, size
from bamba_quant_cli.interrupts import announce_outputs

EXAMPLES = """
Examples:

  bamba-quant repair Bamba-9B-Q4_K_M.gguf

  bamba-quant repair Bamba-9B-Q4_K_M.gguf --in-place
"""


def repair(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A Bamba GGUF made with llama.cpp's converter, in any quantization."
        ),
    ],
    outfile: Annotated[
        Path | None,
        typer.Option("--outfile", "-o", help="File to write; by default the input's name with -repaired."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace the input, once the new file is whole.")
    ] = False,
    threads: opt.Threads = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Repair the q/k row order that llama.cpp's converter gives to Bamba, without loss in any quantization.

    The converter permutes whole heads for a rotary embedding that covers half of each, which costs about 7 % of
    perplexity before any quantization. A file is recognised by its architecture, its partial rotary embedding
    and the absence of bamba-quant's own key; any other is refused.
    """
    from bamba_quant.checkpoint.gguf_file import split_stem
    from bamba_quant.errors import OutputError
    from bamba_quant.hub import local_path
    from bamba_quant.planning.repair import plan_repair, repaired_path
    from bamba_quant.writers import write_plan
    from bamba_quant.writers.commit import restore

    if in_place and outfile is not None:
        raise OutputError("--in-place and --outfile contradict each other", fix="give one of them")
    if in_place:
        restore(file)  # an interrupted run may have replaced some shards
    else:
        file = local_path(file)
    plan = plan_repair(file)
    stem = split_stem(file)
    target = stem.with_name(f"{stem.name}.gguf") if in_place else outfile or repaired_path(file)
    announce_outputs(*plan.paths(target))
    with Progress("repairing", plan.work_bytes) as bar:
        written = write_plan(
            plan,
            target,
            threads=threads,
            overwrite=overwrite or in_place,
            replace_input=in_place,
            progress=bar.advance,
        )
    moved = [row.name for row in plan.rows if row.transform.name]
    n_bytes = sum(path.stat().st_size for path in written)
    if as_json:
        print_json({"files": written, "bytes": n_bytes, "repaired": moved})
        return
    for path in written:
        echo(path)
    echo(
        f"{len(moved)} of {len(plan.rows)} tensors had their rows reordered, the others were copied; "
        f"{size(n_bytes)}",
        err=True,
    )
