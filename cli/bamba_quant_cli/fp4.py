"""``bamba-quant fp4``: a Hugging Face directory to one with FP4 weights, NVFP4 or MXFP4."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.quantized import DirectoryArguments, quantize
from bamba_quant_cli.tuning import with_asked_options

EXAMPLES = """
Examples:

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16 --imatrix imatrix.gguf --ignore hybrid

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-MXFP4A16 --scheme mxfp4a16

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4 --scheme nvfp4a4 --calibrate calibration.txt

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16 --tune calib.txt --tune-device cuda

  bamba-quant fp4 ./Bamba-9B/config.json ./Bamba-9B-NVFP4A16 --dry-run
"""


@with_asked_options
def fp4(
    model: opt.HuggingFaceModel,
    directory: opt.Directory,
    scheme: Annotated[
        Literal["nvfp4a16", "nvfp4a4", "mxfp4a16", "mxfp4a4"],
        typer.Option(
            help="nvfp4a16: an e4m3 scale for 16 columns and a float32 scale for a matrix, or for matrices that "
            "run fused. mxfp4a16: a power of two for 32 columns. With a4 activations have that form, too, and nvfp4a4 "
            "takes a text (--calibrate), which shows what enters each matrix at most."
        ),
    ] = "nvfp4a16",
    scales: Annotated[
        Literal["search", "absmax"],
        typer.Option(
            help="search: a block's scale of least squared error. absmax: its largest weight decides, as with "
            "compressed-tensors."
        ),
    ] = "search",
    asked: DirectoryArguments = DirectoryArguments(),
) -> None:
    """Quantize a checkpoint's linear layers to FP4 (e2m1) in compressed-tensors' forms.

    Embedding, output, norms, convolutions and the recurrence's own parameters stay as they are. Scales are chosen for
    the values a loader reads back. NVFP4 reads each matrix twice, first for its global scale. The directory appears
    whole or not at all, and an interrupted run goes on with --resume and ends with the same bytes.
    """
    quantize(model, directory, scheme, scales, asked)
