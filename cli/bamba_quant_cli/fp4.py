"""``bamba-quant fp4``: a Hugging Face directory to one with FP4 weights, NVFP4 or MXFP4."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.tuning import TuneArguments, with_tune_options

EXAMPLES = """
Examples:

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16 --imatrix imatrix.gguf --ignore hybrid

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-MXFP4A16 --scheme mxfp4a16

  bamba-quant fp4 ./Bamba-9B ./Bamba-9B-NVFP4A16 --tune calib.txt --tune-device cuda

  bamba-quant fp4 ./Bamba-9B/config.json ./Bamba-9B-NVFP4A16 --dry-run
"""


@with_tune_options
def fp4(
    model: opt.HuggingFaceModel,
    directory: opt.Directory,
    scheme: Annotated[
        Literal["nvfp4a16", "mxfp4a16"],
        typer.Option(
            help="nvfp4a16: an e4m3 scale for 16 columns and a float32 scale for a matrix, or for matrices that "
            "run fused. mxfp4a16: a power of two for 32 columns."
        ),
    ] = "nvfp4a16",
    scales: Annotated[
        Literal["search", "absmax"],
        typer.Option(
            help="search: a block's scale of least squared error. absmax: its largest weight decides, as with "
            "compressed-tensors."
        ),
    ] = "search",
    ignore: opt.Ignore = None,
    keep: opt.OldIgnore = None,
    dtype: opt.OtherDtype = "bf16",
    imatrix: opt.Imatrix = None,
    imatrix_strict: opt.ImatrixStrict = False,
    calibrate: opt.Calibrate = None,
    calibrate_chunks: opt.CalibrateChunks = None,
    kv_cache: opt.KvCache = None,
    device: opt.Device = "cpu",
    asked: TuneArguments = TuneArguments(),
    max_shard_size: opt.MaxShardSize = "5G",
    dry_run: opt.DryRun = False,
    tensors: opt.Tensors = False,
    resume: opt.Resume = False,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    threads: opt.Threads = None,
    overwrite: opt.OverwriteDirectory = False,
    as_json: opt.AsJson = False,
) -> None:
    """Quantize a checkpoint's linear layers to FP4 (e2m1) in compressed-tensors' forms.

    Embedding, output, norms, convolutions and the recurrence's own parameters stay as they are; activations stay in
    16 bits. Scales are chosen for the values a loader reads back. nvfp4a16 reads each matrix twice, first for its
    global scale. The directory appears whole or not at all, and an interrupted run goes on with --resume and ends with
    the same bytes.
    """
    from bamba_quant_cli.quantized import quantize

    quantize(
        model,
        directory,
        scheme,
        method=scales,
        ignore=[*(ignore or ()), *(keep or ())],
        dtype=dtype,
        imatrix=imatrix,
        imatrix_strict=imatrix_strict,
        calibrate=calibrate,
        calibrate_chunks=calibrate_chunks,
        kv_cache=kv_cache,
        device=device,
        asked=asked,
        max_shard_bytes=opt.parse_size(max_shard_size, "--max-shard-size"),
        dry_run=dry_run,
        tensors=tensors,
        resume=resume,
        reading=opt.read_options(ignore_config_key, ignore_adapter, strip_prefix),
        threads=threads,
        overwrite=overwrite,
        as_json=as_json,
    )
