"""``bamba-quant quantize``: a Hugging Face directory to one with a scheme, or a mixture of schemes by role."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli import quantized
from bamba_quant_cli.quantized import DirectoryArguments
from bamba_quant_cli.tuning import with_asked_options

EXAMPLES = """
Examples:

  bamba-quant quantize ./Bamba-9B ./Bamba-9B-NVFP4 --recipe hybrid-nvfp4

  bamba-quant quantize ./Bamba-9B ./Bamba-9B-mixed --recipe mine.toml --imatrix imatrix.gguf

  bamba-quant quantize ./Bamba-9B/config.json ./Bamba-9B-NVFP4 --recipe hybrid-nvfp4 --dry-run
"""


@with_asked_options
def quantize(
    model: opt.HuggingFaceModel,
    directory: opt.Directory,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Which role gets which scheme: a built-in mixture such as hybrid-nvfp4 (see recipes), a file of your "
            "own, or one scheme for all.",
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="How all schemes choose scales and codes, such as absmax; by default each scheme's first."
        ),
    ] = None,
    asked: DirectoryArguments = DirectoryArguments(),
) -> None:
    """Quantize a checkpoint's linear layers, each role by its own scheme, in compressed-tensors' form.

    What fp8, int4 and fp4 write in one scheme stands here in one directory as several groups. Matrices that runtimes
    fuse have one scheme and share what it measures. The directory appears whole or not at all, and an interrupted run
    goes on with --resume and ends with the same bytes.
    """
    from bamba_quant.recipes.mixtures import mixture_named, read_mixture

    mixture = read_mixture(Path(recipe)) if recipe.lower().endswith(".toml") else mixture_named(recipe)
    quantized.quantize(model, directory, mixture, method, asked)
