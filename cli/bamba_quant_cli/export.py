"""``bamba-quant export``: a GGUF file to a Hugging Face directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, count, echo, print_json, size
from bamba_quant_cli.interrupts import announce_outputs
from bamba_quant_cli.plans import (
    files_as_json,
    print_files,
    print_roles,
    print_rows,
    rows_as_json,
    written_as_json,
)

if TYPE_CHECKING:
    from bamba_quant.planning.plan import Plan

EXAMPLES = """
Examples:

  bamba-quant export Bamba-9B-BF16.gguf ./Bamba-9B

  bamba-quant export Bamba-9B-Q4_K_M.gguf ./Bamba-9B-from-Q4 --dtype bf16

  bamba-quant export Bamba-9B-BF16-00001-of-00005.gguf ./Bamba-9B --max-shard-size 2G

  bamba-quant export Bamba-9B-BF16.gguf ./Bamba-9B --resume

  bamba-quant export Bamba-9B-BF16.gguf ./Bamba-9B --dry-run
"""


def export(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.gguf", help="A Bamba GGUF of any type, or any shard of a split one."),
    ],
    directory: opt.Directory,
    dtype: Annotated[
        Literal["auto", "f32", "f16", "bf16"],
        typer.Option(
            help="Type of every tensor. auto restores the checkpoint's own: plain matrices keep "
            "their type, quantized ones take the file's 16-bit type, vectors that it holds exactly too."
        ),
    ] = "auto",
    max_shard_size: opt.MaxShardSize = "5G",
    no_vocab: Annotated[bool, typer.Option("--no-vocab", help="Write no tokenizer files.")] = False,
    dry_run: opt.DryRun = False,
    tensors: opt.Tensors = False,
    resume: opt.Resume = False,
    threads: opt.Threads = None,
    overwrite: opt.OverwriteDirectory = False,
    as_json: opt.AsJson = False,
) -> None:
    """Export a GGUF file to a Hugging Face directory: weights, configuration, tokenizer and model card.

    What the file stores unquantized comes back bit for bit, and a bf16 or f16 checkpoint converted without
    quantization is restored whole. Quantized tensors are dequantized. Streams in bounded memory, and the directory
    appears whole or not at all.
    """
    from bamba_quant.planning.export import plan_export
    from bamba_quant.writers import write_plan
    from bamba_quant.writers.resumable import check_output, partial_of

    opt.check_tensors(tensors, dry_run)
    plan = plan_export(
        file,
        dtype=dtype,
        max_shard_bytes=opt.parse_size(max_shard_size, "--max-shard-size"),
        vocab=not no_vocab,
    )
    n_bytes = sum(plan.sizes.values())
    check_output(directory, inputs=plan.inputs, overwrite=overwrite, resume=resume, n_bytes=n_bytes)
    if dry_run:
        _print_plan(plan, directory, tensors, as_json)
        return
    announce_outputs(directory, unfinished=partial_of(directory))
    started = time.monotonic()
    with Progress("exporting", plan.work_bytes) as bar:
        written = write_plan(
            plan, directory, threads=threads, overwrite=overwrite, resume=resume, progress=bar.advance
        )
    seconds = time.monotonic() - started
    found = written_as_json(written, seconds)
    if as_json:
        print_json({"directory": directory, **found, **_summary(plan)})
        return
    for note in plan.notes:
        echo(f"note: {note}", err=True)
    echo(directory)
    echo(
        f"{len(plan.rows)} tensors, {count(plan.elements)} weights, {plan.recipe}, {size(found['bytes'])} in "
        f"{len(written)} files, {seconds:.1f} s",
        err=True,
    )


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.checkpoint.path,
        "architecture": plan.architecture,
        "dtype": plan.recipe,
        "tensors": len(plan.rows),
        "weights": plan.elements,
        "notes": plan.notes,
    }


def _print_plan(plan: Plan, directory: Path, tensors: bool, as_json: bool) -> None:
    if as_json:
        files = files_as_json(plan, directory)
        print_json({"files": files, **_summary(plan), "plan": rows_as_json(plan.rows)})
        return
    (print_rows if tensors else print_roles)(plan.rows)
    for note in plan.notes:
        echo(f"note: {note}")
    echo()
    echo(
        f"{plan.recipe}: {len(plan.rows)} tensors, {count(plan.elements)} weights, {plan.bits_per_weight:.2f} bits per "
        "weight"
    )
    print_files(plan, directory)
