"""``bamba-quant compare``: how far the weights of two models are apart, without a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json, print_table

EXAMPLES = """
Examples:

  bamba-quant compare ./Bamba-9B bamba-9b-Q4_K_M.gguf

  bamba-quant compare bamba-9b-BF16.gguf bamba-9b-Q8_0.gguf --all

  bamba-quant compare bamba-9b-Q4_K_M.gguf bamba-9b-Q4_K_M-tuned.gguf

  bamba-quant compare ./Bamba-9B bamba-9b-Q8_0.gguf --json | jq '.tensors[] | select(.weight_sqnr < 40) | .name'
"""


def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The original: a checkpoint directory or a .gguf file.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other, of any types.")],
    every: Annotated[bool, typer.Option("--all", help="List tensors that are the same too.")] = False,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    as_json: opt.AsJson = False,
) -> None:
    """Compare two models tensor by tensor: signal-to-noise ratio, greatest error, cosine; reads each file once.

    Formats may differ; transforms of a format are undone first. SQNR is 10 log10(Σa² / Σ(b - a)²) in dB.
    Of tensors in the same quantized format the integers that differ are counted, and the scales beside them.
    """
    from dataclasses import asdict

    from bamba_quant.checkpoint import open_checkpoint
    from bamba_quant.evaluation.weights_compare import compare_weights

    reading = opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
    with Progress("comparing", open_checkpoint(b, reading=reading).n_bytes) as bar:
        found = compare_weights(a, b, reading=reading, progress=bar.advance, note=opt.print_note)
    if as_json:
        print_json(asdict(found) | {"same": found.same})
        return
    codes = {each.name: each for each in found.codes}
    rows: list[tuple[str, ...]] = []
    for loss in found.tensors:
        if loss.max_error == 0 and not every:
            continue
        rows.append(
            (
                loss.name,
                loss.base_format,
                loss.format,
                "same" if loss.weight_sqnr is None else f"{loss.weight_sqnr:.2f}",
                f"{loss.max_error:.3g}",
                "" if loss.cosine is None else f"{loss.cosine:.8f}",
                _changed(each.changed, each.codes) if (each := codes.get(loss.name)) else "",
                _changed(each.beside_changed, each.beside) if each else "",
            )
        )
        rows += [
            (f"  rows of {part.name}", "", "", f"{part.weight_sqnr:.2f}", "", "", "", "")
            for part in loss.row_classes
            if part.weight_sqnr is not None
        ]
    if rows:
        header = ("tensor", "A", "B", "SQNR dB", "max error", "cosine")
        print_table((*header, "codes changed", "scales"), rows, right=(3, 4, 5, 6, 7))
        echo()
    alike = sum(loss.max_error == 0 for loss in found.tensors)
    echo(
        f"{len(found.tensors)} tensors, {alike} of them the same"
        + ("" if found.sqnr is None else f"; all weights together {found.sqnr:.2f} dB")
    )
    if codes:
        changed, total = sum(each.changed for each in found.codes), sum(each.codes for each in found.codes)
        echo(
            f"{len(codes)} tensors of the same formats: {_changed(changed, total)} of {total:,} codes changed"
        )


def _changed(changed: int, total: int) -> str:
    return f"{changed:,} ({changed / max(1, total):.2%})"
