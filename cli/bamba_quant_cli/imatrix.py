"""``bamba-quant imatrix``: an importance matrix from a model's own forward pass, as llama-imatrix writes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, count, echo, print_json, size
from bamba_quant_cli.interrupts import announce_outputs

if TYPE_CHECKING:
    from bamba_quant.calibration.cache_ranges import CacheRanges
    from bamba_quant.calibration.imatrix import Round
    from bamba_quant.checkpoint import ReadOptions
    from bamba_quant.checkpoint.imatrix import Imatrix

EXAMPLES = """
Examples:

  bamba-quant imatrix ./Bamba-9B --text calibration.txt

  bamba-quant imatrix ./Bamba-9B --text books.txt.xz --text code.txt --chunks 500 -o bamba-imatrix.gguf

  bamba-quant imatrix bamba-9b-Q8_0.gguf --text more.txt --merge imatrix.gguf -o imatrix-2.gguf
"""


def imatrix(
    model: opt.Model,
    text: opt.Texts = None,
    outfile: Annotated[
        Path,
        typer.Option(
            "--outfile", "-o", metavar="FILE", help="File to write; the older form if it ends in .dat."
        ),
    ] = Path("imatrix.gguf"),
    chunks: Annotated[
        int | None,
        typer.Option(help="Chunks at most, from each text in proportion to its length; by default all."),
    ] = None,
    ctx: opt.Ctx = 512,
    output_tensor: Annotated[
        bool, typer.Option("--output-tensor", help="Measure what enters output.weight, too.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Importance matrix, .gguf or .dat, to add to. Repeatable."),
    ] = None,
    tokenizer: opt.Tokenizer = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    threads: opt.Threads = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    overwrite: opt.Overwrite = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure an importance matrix: the mean square of each input channel of each matrix over a text.

    The definition and the file are llama-imatrix's, and llama-quantize takes it as well as convert, int4, fp4 and fp8
    do (--imatrix). Runs every model and format this tool reads, one layer in memory at a time.
    """
    from bamba_quant.calibration.imatrix import measure_imatrix
    from bamba_quant.calibration.imatrix_writer import check_imatrix_target, write_imatrix
    from bamba_quant.hub import local_path
    from bamba_quant.inference.threads import use_threads

    use_threads(threads)
    texts, earlier, model = text or [], merge or [], local_path(model)
    inputs = [each for each in (*texts, *earlier, model) if each.is_file()]
    check_imatrix_target(outfile, overwrite=overwrite, inputs=inputs)
    announce_outputs(outfile)
    started = time.monotonic()
    with Progress("imatrix: layer") as bar:
        measured = measure_imatrix(
            model,
            texts,
            chunks=chunks,
            ctx=ctx,
            output=output_tensor,
            merge=earlier,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            reading=opt.read_options(ignore_config_key, ignore_adapter, strip_prefix),
            progress=show_layers(bar),
        )
    seconds = time.monotonic() - started
    sums = measured.sums
    write_imatrix(sums, outfile, overwrite=overwrite, inputs=inputs)
    if as_json:
        print_json(
            {
                "model": model,
                "file": outfile,
                "bytes": outfile.stat().st_size,
                "entries": len(sums.entries),
                "tokens": measured.tokens,
                "ctx": ctx,
                "chunks": sums.chunks,
                "texts": [{"file": each.path, "sha256": each.sha256} for each in measured.texts],
                "merged": earlier,
                "experts_without_data": sums.experts_without_data,
                "notes": measured.notes,
                "device": device,
                "dtype": dtype,
                "seconds": round(seconds, 3),
            }
        )
        return
    for note in measured.notes:
        opt.print_note(note)
    echo(outfile)
    echo(
        f"{len(sums.entries)} entries, {count(measured.tokens)} tokens measured, {sums.chunks} chunks of {ctx} in all, "
        f"{size(outfile.stat().st_size)}, {seconds:.1f} s ({measured.tokens / seconds:.0f} tokens/s)",
        err=True,
    )


def calibrate_imatrix(
    model: Path,
    texts: list[Path],
    chunks: int | None,
    device: str,
    reading: ReadOptions,
    *,
    bounds: bool = False,
    strict: bool = False,
    cache: CacheRanges | None = None,
) -> Imatrix:
    """The importance matrix of --calibrate: that of ``model`` on ``texts``, and with ``bounds`` the largest inputs.

    ``cache`` sees the keys and values.

    Prints its notes.

    ``device`` "auto" is a GPU where there is one, "numpy" is the CPU.
    """
    from bamba_quant.calibration.imatrix import calibrated as measure

    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = "cpu" if device == "numpy" else device
    with Progress("calibrating: layer") as bar:
        imatrix, notes = measure(
            model,
            texts,
            chunks=chunks,
            bounds=bounds,
            device=device,
            strict=strict,
            cache=cache,
            reading=reading,
            progress=show_layers(bar),
        )
    for note in notes:
        opt.print_note(note)
    return imatrix


def show_layers(bar: Progress) -> Callable[[Round], None]:
    """A function that shows in ``bar`` how many layers are done."""

    def show(now: Round) -> None:
        part = f", round {now.round + 1} of {now.rounds}" if now.rounds > 1 else ""
        bar.update(now.round * now.layers + now.layer, now.rounds * now.layers, part)

    return show
