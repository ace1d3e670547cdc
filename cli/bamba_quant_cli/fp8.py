"""``bamba-quant fp8``: a Hugging Face directory to one with FP8 weights."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.quantized import DirectoryArguments, quantize
from bamba_quant_cli.tuning import with_asked_options

EXAMPLES = """
Examples:

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8 --scheme tensor --ignore hybrid

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8 --format fp8

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8 --calibrate calib.txt --kv-cache fp8

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8 --tune calib.txt --tune-device cuda

  bamba-quant fp8 ./Bamba-9B ./Bamba-9B-fp8 --resume

  bamba-quant fp8 ./Bamba-9B/config.json ./Bamba-9B-fp8 --scheme tensor --dry-run
"""

_SCHEMES = {
    ("compressed-tensors", "dynamic"): "fp8-dynamic",
    ("compressed-tensors", "tensor"): "fp8-tensor",
    ("compressed-tensors", "block"): "fp8-block",
    ("fp8", "block"): "fp8-block-inv",
}


@with_asked_options
def fp8(
    model: opt.HuggingFaceModel,
    directory: opt.Directory,
    scheme: Annotated[
        Literal["dynamic", "tensor", "block"] | None,
        typer.Option(
            help="What shares a scale. dynamic: a row, activations by token. tensor: a matrix, or those that run "
            "fused; the one for tensor parallelism in vLLM. block: 128 × 128. By default dynamic, or block with "
            "--format fp8.",
        ),
    ] = None,
    layout: Annotated[
        Literal["compressed-tensors", "fp8"],
        typer.Option(
            "--format",
            help="compressed-tensors, which vLLM and transformers read; or fp8, transformers' own form, which only has "
            "blocks and needs both sides of every matrix to be multiples of 128.",
        ),
    ] = "compressed-tensors",
    scales: Annotated[
        Literal["search", "absmax"],
        typer.Option(
            help="search: the scale of least squared error. absmax: the largest weight becomes 448."
        ),
    ] = "search",
    asked: DirectoryArguments = DirectoryArguments(),
) -> None:
    """Quantize a checkpoint's linear layers to FP8 (e4m3), in one pass over its rows and in bounded memory.

    Embedding, output, norms, convolutions and the recurrence's own parameters stay as they are. Each weight is
    rounded once, from the original in float32, against the scale that a loader reads. The directory appears whole or
    not at all, and an interrupted run goes on with --resume and ends with the same bytes.
    """
    quantize(model, directory, _scheme(layout, scheme), scales, asked)


def _scheme(layout: str, kind: str | None) -> str:
    """The scheme's name. Raises ``BadParameter`` for options that do not go together."""
    kind = kind or next(known for form, known in _SCHEMES if form == layout)
    if (layout, kind) not in _SCHEMES:
        known = "; ".join(f"--format {form} --scheme {other}" for form, other in _SCHEMES)
        raise typer.BadParameter(f"{layout} has no scheme {kind!r}; use {known}", param_hint="--scheme")
    return _SCHEMES[layout, kind]
