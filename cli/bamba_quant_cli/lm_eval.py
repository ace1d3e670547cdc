"""``bamba-quant lm-eval``: lm-evaluation-harness' own command line, with every file that this tool reads as a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bamba_quant_cli import options as opt
from bamba_quant_cli.console import Progress, echo_lines

if TYPE_CHECKING:
    from bamba_quant.evaluation.result import Evaluation

# Every argument is the harness', --help of its commands too.
SETTINGS: dict[str, Any] = {
    "options_metavar": "[MODEL] [run|ls|validate] [OPTIONS OF LM-EVAL]",
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
}
EXAMPLES = """
Examples:

  bamba-quant lm-eval bamba-9b-Q4_K_M.gguf --tasks arc_easy,hellaswag

  bamba-quant lm-eval ./Bamba-9B-FP8 --tasks lambada_openai --device cuda --model_args dtype=bfloat16

  bamba-quant lm-eval --model bamba-quant --model_args pretrained=q4.gguf,dtype=float32,device=cpu --tasks arc_easy

  bamba-quant lm-eval ls tasks

  bamba-quant lm-eval run --help
"""


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a GGUF file or a directory: its command line, its tasks, its results.

    MODEL, or --model bamba-quant --model_args pretrained=MODEL, is read in this process.
    Further --model_args: tokenizer, dtype, device, backend, activations, weights, batch_size, max_length, max_gen_toks,
    add_bos_token, prefix_token_id and seed.
    All other arguments are the harness'. It needs pip install 'bamba-quant\\[lm-eval]'.
    """
    if not context.args or context.args[0] in ("-h", "--help"):
        echo_lines(context.get_help())
        return
    from bamba_quant.tasks.harness import run_command_line

    run_command_line(context.args)


def task_scorer(options: dict[str, Any], first: bool) -> Callable[[Evaluation], Evaluation] | None:
    """A function that adds the scores on --tasks to an evaluation; the tasks are opened now, for their errors."""
    names = [name.strip() for each in options["tasks"] or () for name in each.split(",")]
    if not names or not first:
        return None
    from bamba_quant.errors import BambaQuantError
    from bamba_quant.evaluation.logits_file import is_logits_file
    from bamba_quant.tasks.harness import open_tasks
    from bamba_quant.tasks.scores import task_results

    if is_logits_file(options["base"]):
        raise BambaQuantError(
            "a file of logits cannot be scored on tasks",
            where=options["base"],
            fix="give a model as the base, or leave out --tasks",
        )
    if options["cache_type"] or options["state_type"]:
        raise BambaQuantError(
            "tasks are scored with cache and state as computed",
            found="--tasks with --cache-type or --state-type",
            fix="leave one of them out",
        )
    opened = open_tasks(names, options["include_path"])

    def score_tasks(evaluation: Evaluation) -> Evaluation:
        models = [evaluation.base, *(candidate.model for candidate in evaluation.candidates)]
        with Progress("") as bar:
            found = task_results(
                {model.label: Path(model.path) for model in models},
                opened,
                limit=options["limit"],
                progress=lambda label, done, total: bar.update(done, total, f" {label}", doing="tasks:"),
                activations=evaluation.run.options["activations"],
                reading=opt.read_options(
                    options["ignore_config_key"], options["ignore_adapter"], options["strip_prefix"]
                ),
                **{name: options[name] for name in ("dtype", "device", "backend", "tokenizer")},
            )
        return replace(evaluation, tasks=found)

    return score_tasks
