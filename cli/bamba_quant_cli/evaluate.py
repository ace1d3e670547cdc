"""``bamba-quant evaluate``: what candidates lost against their base, with intervals, a noise floor, drift and gates."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bamba_quant.hub import local_path
from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo, print_json
from bamba_quant_cli.evaluation_screen import print_screen
from bamba_quant_cli.evaluation_tables import gate_lines, print_details
from bamba_quant_cli.gate_options import GATES, gate_option, given_limits
from bamba_quant_cli.interrupts import announce_outputs, set_interrupt_message
from bamba_quant_cli.lm_eval import task_scorer
from bamba_quant_cli.processes import run_in_processes

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Evaluation
    from bamba_quant.evaluation.scoring import EvaluationProgress

EXAMPLES = """
Examples:

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q4_K_M.gguf --text wiki.test.raw

  bamba-quant evaluate ./Bamba-9B *.gguf ./Bamba-9B-FP8 --text wiki.test.raw --chunks 40 --report-dir report

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q4_K_M.gguf --text wiki.test.raw --quick

  bamba-quant evaluate bamba-9b-BF16.gguf bamba-9b-Q4_K_M.gguf --text wiki.test.raw --max-kld 0.05 --min-same-top 0.9

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q4_K_M.gguf --text wiki.test.raw --gates gates.toml

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q8_0.gguf --text wiki.test.raw --save-base bamba-9b.kld

  bamba-quant evaluate bamba-9b.kld bamba-9b-Q4_K_M.gguf

  bamba-quant evaluate ./Bamba-9B --text wiki.test.raw --state-type fp16,fp16-stochastic,fp8 --ctx 4096

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q4_K_M.gguf --text wiki.test.raw --tasks arc_easy,hellaswag

  bamba-quant evaluate ./Bamba-9B bamba-9b-Q4_K_M.gguf --text wiki.test.raw --device cuda --processes 2

  torchrun --nproc-per-node 2 -m bamba_quant_cli evaluate ./Bamba-9B q4.gguf --text wiki.test.raw --device cuda
"""


def evaluate(
    context: typer.Context,
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="The original: a directory, a .gguf file, org/name on the Hub, or a file of logits (--save-base).",
        ),
    ],
    candidates: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CANDIDATE…]",
            help="Checkpoint directories and .gguf files, of any types; with --cache-type or --state-type by default "
            "BASE.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", "-f", metavar="FILE", help="UTF-8 text to evaluate on; a file of logits has its own."
        ),
    ] = None,
    ctx: Annotated[
        int,
        typer.Option(
            "--ctx", "-c", help="Tokens of a chunk; its second half is scored. A file of logits has its own."
        ),
    ] = 512,
    chunks: opt.Chunks = None,
    save_base: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the base's logits as llama-perplexity's --kl-divergence-base does."
        ),
    ] = None,
    overwrite: opt.Overwrite = False,
    report_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.json, report.md and report.html there.")
    ] = None,
    activations: opt.Activations = "auto",
    cache_type: opt.CacheTypes = "",
    state_type: opt.StateTypes = "",
    noise_floor: Annotated[
        Literal["order", "bfloat16", "none"],
        typer.Option(help="Path of the base's comparison with itself: order (of the sums), or bfloat16."),
    ] = "order",
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of stochastic rounding.")] = 0,
    resamples: Annotated[int, typer.Option(min=1000, help="Of the bootstrap.")] = 10_000,
    floor_chunks: Annotated[int, typer.Option(min=1, help="Chunks the noise floor is measured on.")] = 2,
    drift_chunks: Annotated[
        int, typer.Option(min=0, help="Chunks whose first 128 tokens drift is watched on; 0 for none.")
    ] = 2,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK,…",
            help="Also score base and candidates on these tasks of lm-evaluation-harness. Repeatable.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="YAML files of further tasks.", rich_help_panel="Tasks"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of each task at most; by default all.", rich_help_panel="Tasks"),
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML: limits by recipe, such as max-kld below \\[q4_k_m].",
            rich_help_panel="Gates",
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LIMIT", help="Any other limit. Repeatable.", rich_help_panel="Gates"),
    ] = None,
    max_kld: Annotated[float | None, gate_option("max-kld")] = None,
    max_kld_99: Annotated[float | None, gate_option("max-kld-99")] = None,
    max_kld_99_9: Annotated[float | None, gate_option("max-kld-99-9")] = None,
    max_ppl_ratio: Annotated[float | None, gate_option("max-ppl-ratio")] = None,
    max_delta_p_rms: Annotated[float | None, gate_option("max-delta-p-rms")] = None,
    max_flips: Annotated[float | None, gate_option("max-flips")] = None,
    min_same_top: Annotated[float | None, gate_option("min-same-top")] = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    backend: opt.Backend = "auto",
    processes: opt.Processes = 1,
    threads: opt.Threads = None,
    tokenizer: opt.Tokenizer = None,
    ignore_config_key: opt.IgnoreConfigKey = None,
    ignore_adapter: opt.IgnoreAdapter = False,
    strip_prefix: opt.StripPrefix = "",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Print the figures of the first chunks as soon as they are known, then go on with the whole text. "
            "Without effect on --json.",
        ),
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Print every figure, drift by layer and the worst tensors of each file."),
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Prove what quantized files lost: perplexity, divergence and drift of any formats, in one pass over a text.

    Figures are llama-perplexity's, under its names; intervals take whole chunks to be independent, not tokens. A gate
    is tested on its figure's one-sided 95 % bound: exit code 1 when one fails.
    """
    announce_outputs(save_base, report_dir / "report.json" if report_dir else None)
    base, candidates = local_path(base), [local_path(candidate) for candidate in candidates or ()]
    run_in_processes(processes, text, gates)
    from bamba_quant.evaluation.evaluate import evaluate as measure
    from bamba_quant.evaluation.gates import read_gates, refuse_unmeasurable
    from bamba_quant.evaluation.run import EvaluationOptions
    from bamba_quant.inference.distributed import join_ranks
    from bamba_quant.inference.threads import use_threads
    from bamba_quant.report.write import check_output, prepared_directory, write_reports

    given = {name: context.params[name.replace("-", "_")] for name in GATES}
    read = [path for path in (base, *candidates, text, gates, tokenizer) if path and path.exists()]
    kept = [*read, *([save_base] if save_base else [])]
    use_threads(threads)
    with join_ranks() as ranks, ExitStack() as stack, Progress("", hidden=not ranks.first) as bar:
        score_tasks = task_scorer(context.params, ranks.first)
        if ranks.first and save_base:
            check_output(save_base, overwrite=overwrite, inputs=read)
        if ranks.first and report_dir:
            stack.enter_context(prepared_directory(report_dir, overwrite=overwrite, inputs=kept))
        bar.say("reading models and text")
        evaluation = measure(
            base,
            candidates or (),
            text,
            EvaluationOptions(
                ctx=ctx,
                chunks=chunks,
                dtype=dtype,
                device=device,
                backend=backend,
                seed=seed,
                resamples=resamples,
                noise_floor=noise_floor,
                floor_chunks=floor_chunks,
                drift_chunks=drift_chunks,
                activations=activations,
                cache_type=cache_type,
                state_type=state_type,
                tokenizer=tokenizer,
                reading=opt.read_options(ignore_config_key, ignore_adapter, strip_prefix),
                save_base=save_base,
                overwrite=overwrite,
            ),
            gates=read_gates(gates) if gates else None,
            limits=given_limits(given, gate or []),
            command=shlex.join(
                ["bamba-quant", *sys.argv[1:]] if processes > 1 else ranks.command(sys.argv[1:])
            ),
            progress=show_evaluation(bar) if ranks.first else lambda progress: None,
            note=opt.print_note,
            quick=_quick_shower(bar) if quick and not as_json else None,
            ranks=ranks,
        )
    if not ranks.first:
        return
    reports: Sequence[Path] = ()
    try:
        try:
            if score_tasks:
                evaluation = score_tasks(evaluation)
        finally:  # without scores, where a task fails
            if report_dir:
                reports = write_reports(evaluation, report_dir, overwrite=overwrite, inputs=kept)
    finally:  # what took so long is shown, even where it cannot be written
        if as_json:
            print_json(asdict(evaluation))
        else:
            print_screen(evaluation, full=full)
            if full:
                print_details(evaluation)
            else:
                echo()
                echo("--full: every figure, drift by layer, worst tensors")
    for file in reports:
        echo(file, err=as_json)
    refuse_unmeasurable(evaluation)
    if not evaluation.passed:
        for candidate in evaluation.candidates if as_json else ():
            for line in gate_lines(candidate, failed=True):
                echo(line, err=True)
        raise typer.Exit(1)


def _quick_shower(bar: Progress) -> Callable[[Evaluation], None]:
    """A function that prints the figures of the first chunks, which an interrupt leaves."""

    def show(evaluation: Evaluation) -> None:
        bar.close()
        print_screen(evaluation, full=True)  # without remedies
        echo()
        few = f"the first {evaluation.text.chunks} chunks"
        echo(f"These are {few}; the whole text follows.", err=True)
        set_interrupt_message(lambda: f"the figures above are of {few}")

    return show


def show_evaluation(bar: Progress) -> Callable[[EvaluationProgress], None]:
    """A function that shows in ``bar`` how far the run is and, once tokens are scored, the figures so far."""
    stages = {"layers": "layer", "tokens": "scoring tokens"}

    def show(now: EvaluationProgress) -> None:
        klds = [f"{label} {figures['kld_mean']:.5f}" for label, figures in now.estimates.items()][:3]
        detail = f"; mean KLD {', '.join(klds)}" if klds else ""
        bar.update(now.done, now.total, detail, doing=stages.get(now.stage, now.stage), work=now.work)

    return show
