"""``bamba-quant perplexity``: a text's perplexity as llama-perplexity defines it, for any model this tool reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli.console import print_json

if TYPE_CHECKING:
    from bamba_quant.weights import LoadedModel
    from bamba_reference.perplexity import Estimate, Scorer

EXAMPLES = """
Examples:

  bamba-quant perplexity ./Bamba-9B --text wiki.test.raw

  bamba-quant perplexity bamba-9b-Q8_0.gguf --text wiki.test.raw --chunks 40

  bamba-quant perplexity ./Bamba-9B --text wiki.test.raw --stream
"""


def perplexity(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint directory or a .gguf file.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to score.")],
    ctx: Annotated[int, typer.Option(help="Tokens of a chunk; its second half is scored.")] = 512,
    chunks: Annotated[int | None, typer.Option(help="Chunks at most; by default the whole text.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Run layer by layer: one layer in memory instead of the model.")
    ] = False,
    backend: Annotated[str, typer.Option(help="torch, or numpy: the definition, slow.")] = "torch",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="torch's name of the device.")] = "cpu",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take the tokenizer of this checkpoint instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity exactly as llama-perplexity defines it, of safetensors and GGUF alike.

    Disjoint chunks of --ctx tokens, the first token of each replaced by BOS where the tokenizer adds one, the
    second half of each scored.
    """
    from bamba_quant.running import open_model, read_text
    from bamba_reference.perplexity import perplexity as measure

    words, digest = read_text(text)
    loaded, encoder = open_model(model, tokenizer)
    started = time.monotonic()
    estimate = measure(
        _scorer(loaded, stream, backend, dtype, device),
        encoder.encode(words),
        vocab_size=loaded.config.vocab_size,
        ctx=ctx,
        bos=encoder.bos,
        chunks=chunks,
        progress=_teller(started),
    )
    seconds = time.monotonic() - started
    if as_json:
        print_json(
            {
                "model": model,
                "perplexity": estimate.perplexity,
                "error": estimate.error,
                "chunks": estimate.chunks,
                "ctx": estimate.ctx,
                "tokens_scored": estimate.scored,
                "text": text,
                "text_sha256": digest,
                "backend": backend,
                "dtype": dtype,
                "device": device,
                "stream": stream,
                "seconds": round(seconds, 3),
            }
        )
        return
    typer.echo(
        f"perplexity {estimate.perplexity:.4f} ± {estimate.error:.4f}  ({estimate.chunks} chunks of {ctx}, "
        f"{estimate.scored} tokens scored, {estimate.chunks * ctx / seconds:.0f} tokens/s)"
    )


def _scorer(loaded: LoadedModel, stream: bool, backend: str, dtype: str, device: str) -> Scorer:
    from bamba_quant.errors import BambaQuantError
    from bamba_quant.running import torch_dtype
    from bamba_reference.perplexity import numpy_scorer, stream_scorer, torch_scorer

    if backend == "numpy":
        if stream or device != "cpu" or dtype not in ("float32", "float64"):
            raise BambaQuantError(
                "the numpy backend runs whole models on the CPU in float32 or float64",
                found=f"--stream {stream}, --device {device}, --dtype {dtype}",
                fix="take --backend torch for these",
            )
        return numpy_scorer(loaded.config, loaded.weights, dtype)
    if backend != "torch":
        raise BambaQuantError("no such backend", found=backend, expected="torch, numpy")
    if stream:
        return stream_scorer(
            loaded.config, loaded.weights, dtype=torch_dtype(dtype), device=device, on_layer=_tell_layer
        )
    from bamba_reference.torch_forward import load

    return torch_scorer(load(loaded.config, loaded.weights, dtype=torch_dtype(dtype), device=device))


def _tell_layer(done: int, layers: int) -> None:
    _line(f"layer {done} of {layers}", last=done == layers)


def _teller(started: float, seconds_between_lines: float = 5.0) -> Callable[[Estimate], None]:
    told = started

    def tell(estimate: Estimate) -> None:
        nonlocal told
        last = estimate.chunks == estimate.total
        now = time.monotonic()
        if sys.stderr.isatty() or now - told >= seconds_between_lines:
            told = now
            left = (now - started) / estimate.chunks * (estimate.total - estimate.chunks)
            _line(
                f"chunk {estimate.chunks} of {estimate.total}: perplexity {estimate.perplexity:.4f} ± "
                f"{estimate.error:.4f}, {left:.0f} s left",
                last,
            )

    return tell


def _line(text: str, last: bool) -> None:
    """Over the last line on a terminal, a line of its own elsewhere."""
    if sys.stderr.isatty():
        typer.echo(f"\r\x1b[K{text}", nl=last, err=True)
    else:
        typer.echo(text, err=True)
