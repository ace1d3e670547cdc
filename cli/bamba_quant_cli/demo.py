"""``bamba-quant demo``: the main job, done on the model that travels with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bamba_quant_cli.console import print_table, size

EXAMPLES = """
Examples:

  bamba-quant demo

  bamba-quant demo --out /somewhere/else
"""


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the files it makes.")] = Path("demo"),
) -> None:
    """Convert the embedded bamba-mini to GGUF in every type, and show what came out."""
    from bamba_quant.convert import plan_conversion
    from bamba_quant.embedded import embedded_model
    from bamba_quant.inspection import inspect_path
    from bamba_quant.recipes import RECIPES
    from bamba_quant.writers import write_gguf

    model = embedded_model()
    out.mkdir(parents=True, exist_ok=True)
    typer.echo(f"{model.name}: 4.2 million weights, trained for this project\n")
    rows = []
    for name in RECIPES:
        started = time.monotonic()
        conversion = plan_conversion(model, outtype=name, outfile=out)
        (file,) = write_gguf(conversion.plan, conversion.outfile, overwrite=True)
        seconds = time.monotonic() - started
        rows.append(
            (
                name,
                file,
                size(file.stat().st_size),
                f"{inspect_path(file).bits_per_weight:.2f}",
                f"{seconds:.2f} s",
            )
        )
    print_table(("type", "file", "size", "bits per weight", "time"), rows, right=(2, 3, 4))
    typer.echo("\nEach runs in llama.cpp as it is. Look inside with: bamba-quant inspect FILE --tensors")
