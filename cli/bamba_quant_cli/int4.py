"""``bamba-quant int4``: a Hugging Face directory to one with weights of 4 or 8 bits."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.quantized import DirectoryArguments, quantize
from bamba_quant_cli.tuning import with_asked_options

EXAMPLES = """
Examples:

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w4a16

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w4a16 --imatrix imatrix.gguf --ignore hybrid

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w4a16 --calibrate calibration.txt

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w4a16 --tune calib.txt --tune-device cuda

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-w8a16 --bits 8

  bamba-quant int4 ./Bamba-9B ./Bamba-9B-int4 --format torchao

  bamba-quant int4 ./Bamba-9B/config.json ./Bamba-9B-w4a16 --dry-run
"""


@with_asked_options
def int4(
    model: opt.HuggingFaceModel,
    directory: opt.Directory,
    layout: Annotated[
        Literal["compressed-tensors", "torchao", "torchao-tile-packed"],
        typer.Option(
            "--format",
            help="compressed-tensors (pack-quantized), which vLLM and transformers read; torchao, Int4Tensor in plain "
            "packing; or torchao-tile-packed, for CUDA's tinygemm kernel.",
        ),
    ] = "compressed-tensors",
    bits: Annotated[Literal[4, 8], typer.Option(help="4, or 8 with compressed-tensors.")] = 4,
    group_size: Annotated[Literal[128, 64, 32], typer.Option(help="Columns that share a scale.")] = 128,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without or with integer zero points, for compressed-tensors; symmetric by default. torchao's zeros "
            "are floats.",
        ),
    ] = None,
    method: Annotated[
        Literal["hqq", "mse", "rtn"],
        typer.Option(
            help="hqq: scales searched, then refitted with the integers by least squares. mse: the clipped range of "
            "least squared error. rtn: round to nearest over the whole range."
        ),
    ] = "hqq",
    asked: DirectoryArguments = DirectoryArguments(),
) -> None:
    """Quantize a checkpoint's linear layers to integers of 4 or 8 bits, in one pass over its rows.

    Embedding, output, norms, convolutions and the recurrence's own parameters stay as they are; activations stay in
    16 bits. Scales are chosen for the values a loader reads back. The directory appears whole or not at all, and an
    interrupted run goes on with --resume and ends with the same bytes.
    """
    quantize(model, directory, _scheme(layout, bits, group_size, symmetric), method, asked)


def _scheme(layout: str, bits: int, group: int, symmetric: bool | None) -> str:
    """The scheme's name. Raises ``BadParameter`` for options that do not go together."""
    from bamba_quant.codecs.integers import pack_quantized, torchao_plain

    if layout == "compressed-tensors":
        return pack_quantized.scheme_name(bits, symmetric is not False, group)
    if bits != 4:
        raise typer.BadParameter(f"{layout} has 4 bits, not {bits}", param_hint="--bits")
    if symmetric is not None:
        raise typer.BadParameter(
            f"{layout} has float zero points, so this option does not apply",
            param_hint="--symmetric/--asymmetric",
        )
    return torchao_plain.scheme_name(group, tile_packed=layout == "torchao-tile-packed")
