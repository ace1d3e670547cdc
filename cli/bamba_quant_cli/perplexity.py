"""``bamba-quant perplexity``: a text's perplexity as llama-perplexity defines it, for any model this tool reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json
from bamba_quant_cli.processes import run_in_processes
from bamba_quant_cli.terminal import echo_wrapped

if TYPE_CHECKING:
    from bamba_quant.inference.distributed import Ranks
    from bamba_quant.inference.loading import LoadedModel
    from bamba_reference.runtime.perplexity import Estimate, Scorer

EXAMPLES = """
Examples:

  bamba-quant perplexity ./Bamba-9B --text wiki.test.raw

  bamba-quant perplexity bamba-9b-Q8_0.gguf --text wiki.test.raw --chunks 40

  bamba-quant perplexity ./Bamba-9B --text wiki.test.raw --stream

  bamba-quant perplexity ./Bamba-9B --text wiki.test.raw --device cuda --processes 2

  torchrun --nproc-per-node 2 -m bamba_quant_cli perplexity ./Bamba-9B --text wiki.test.raw --device cuda
"""


def perplexity(
    model: opt.Model,
    text: Annotated[Path, typer.Option("--text", "-f", metavar="FILE", help="UTF-8 text to score.")],
    ctx: opt.ScoredCtx = 512,
    chunks: opt.Chunks = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Run layer by layer: one layer in memory instead of the model.")
    ] = False,
    activations: opt.Activations = "none",
    backend: opt.Backend = "auto",
    weights: opt.Weights = "auto",
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    processes: opt.Processes = 1,
    threads: opt.Threads = None,
    tokenizer: opt.Tokenizer = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    as_json: opt.AsJson = False,
) -> None:
    """Perplexity exactly as llama-perplexity defines it, of safetensors and GGUF alike.

    Disjoint chunks of --ctx tokens, the first token of each replaced by BOS where the tokenizer adds one, the
    second half of each scored.
    """
    run_in_processes(processes, text)
    from bamba_quant.inference.distributed import join_ranks
    from bamba_quant.inference.loading import load_model_and_tokenizer, read_text
    from bamba_quant.inference.threads import use_threads
    from bamba_reference.runtime.perplexity import perplexity as measure

    use_threads(threads)
    with join_ranks() as ranks, Progress("", hidden=not ranks.first) as bar:
        bar.say("reading model and text")
        words, digest = read_text(text)
        loaded, encoder = load_model_and_tokenizer(
            model, tokenizer, opt.read_options(ignore_config_key, ignore_adapter, strip_prefix)
        )
        for note in loaded.checkpoint.notes if ranks.first else ():
            opt.print_note(note)
        started = time.monotonic()
        scorer, chosen = _scorer(loaded, stream, activations, backend, weights, dtype, device, ranks, bar)
        estimate = measure(
            scorer,
            encoder.encode(words),
            vocab_size=loaded.config.vocab_size,
            ctx=ctx,
            bos=encoder.bos,
            chunks=chunks,
            progress=_show_estimate(bar, ranks) if ranks.first else None,
        )
        seconds = time.monotonic() - started
    if not ranks.first:
        return
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
                "backend": chosen,
                "dtype": dtype,
                "device": device,
                "activations": activations,
                "processes": ranks.size,
                "stream": stream,
                "seconds": round(seconds, 3),
            }
        )
        return
    echo(f"perplexity {estimate.perplexity:.4f} ± {estimate.error:.4f}")
    echo_wrapped(
        f"{estimate.chunks} chunks of {ctx} tokens, {estimate.scored:,} scored; "
        f"{estimate.chunks * ctx / seconds:,.0f} tokens/s, backend {chosen}"
    )


def _scorer(
    loaded: LoadedModel,
    stream: bool,
    activations: str,
    backend: str,
    weights: str,
    dtype: str,
    device: str,
    ranks: Ranks,
    bar: Progress,
) -> tuple[Scorer, str]:
    """The scorer over all processes' parts, and the name of the backend it came to."""
    from bamba_quant.errors import BambaQuantError
    from bamba_quant.evaluation.activations import resolve, with_activations
    from bamba_quant.inference.distributed import spread_over_ranks
    from bamba_quant.inference.loading import torch_device, torch_dtype
    from bamba_quant.inference.ready import ready_model
    from bamba_quant.inference.stream_weights import StreamWeights
    from bamba_quant.inference.weights import Timings
    from bamba_reference.backends import backend_named
    from bamba_reference.runtime.perplexity import batched, numpy_scorer, stream_scorer, torch_scorer
    from bamba_reference.runtime.stream import together

    rounding = resolve(activations, [loaded.checkpoint.kind])
    if weights != "auto" and (stream or backend == "numpy"):
        raise BambaQuantError(
            "--weights has no effect on models that are read layer by layer",
            found=f"--weights {weights} with " + ("--stream" if stream else "--backend numpy"),
            fix="leave one of them out",
        )
    if backend == "numpy":
        plain = device == "cpu" and dtype in ("float32", "float64") and rounding == "none"
        if stream or not plain:
            raise BambaQuantError(
                "the numpy backend runs whole models on the CPU in float32 or float64, activations none",
                found=f"--stream {stream}, --device {device}, --dtype {dtype}, --activations {rounding}",
                fix="take --backend torch for these",
            )
        return spread_over_ranks(
            numpy_scorer(loaded.config, loaded.weights, dtype), lambda ctx: 1, ranks
        ), backend
    where, number = torch_device(ranks.device(device), device), torch_dtype(dtype)
    if stream:
        kernels = with_activations(backend_named(backend, where, number), loaded, rounding, where, number)
        scorer = stream_scorer(
            loaded.config,
            StreamWeights(loaded.weights, loaded.config, number, where, Timings()),
            dtype=number,
            device=where,
            backend=kernels,
            on_layer=_show_layers(bar, ranks),
        )
        return spread_over_ranks(scorer, lambda ctx: together(ctx, where), ranks), kernels.name
    ready = ready_model(
        loaded,
        where,
        number,
        backend=backend,
        activations=rounding,
        weights=weights,
        instead="--stream, which holds one layer at a time",
    )
    return spread_over_ranks(torch_scorer(ready), batched, ranks), ready.backend.name


def _show_layers(bar: Progress, ranks: Ranks) -> Callable[[int, int], None]:
    def show(done: int, layers: int) -> None:
        ranks.check()
        if ranks.first:
            bar.update(done, layers, doing="layer")

    return show


def _show_estimate(bar: Progress, ranks: Ranks) -> Callable[[Estimate], None]:
    """A function that shows the running estimate.

    Of several processes the first shows its own part, which is the beginning of the text; the others' estimates follow
    when it is done, so the time left is that of the first part.
    """

    def show(now: Estimate) -> None:
        part = -(-now.total // ranks.size)
        detail = f": perplexity {now.perplexity:.4f} ± {now.error:.4f}"
        bar.update(now.chunks, part if now.chunks <= part else now.total, detail, doing="chunk")

    return show
