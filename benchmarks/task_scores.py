"""Measures the model of ``bamba-quant lm-eval`` beside lm-evaluation-harness' own Hugging Face backend on a CPU.

    PYTHONPATH=. python benchmarks/task_scores.py --model ../shared/models/bamba-43m --text ../shared/data/eval.txt

makes a task of four-choice questions from the text (which of four pieces follows a context of 60 to 150 tokens; choices
of 3 to 15 tokens), has both answer it in turns, and prints the median seconds of the whole evaluation, its building of
requests included, and their ratio. Both compute in float32 on --threads threads. The accuracies and the greatest
difference between log-likelihoods are printed too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8], help="of the Hugging Face backend"
    )
    given = parser.parse_args()

    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from bamba_quant.tasks import BambaQuantLM
    from tests.support.tasks import CHOICE, questions, write_task

    torch.set_num_threads(given.threads)
    ours = BambaQuantLM(given.model)
    models: dict[str, Any] = {"bamba-quant": ours} | {
        f"hf, batch size {size}": HFLM(str(given.model), device="cpu", dtype="float32", batch_size=size)
        for size in given.batch_sizes
    }
    with tempfile.TemporaryDirectory() as directory:
        drawn = questions(given.text.read_text(), 4 * given.questions, context=(30, 80), choice=(2, 7))
        lengths = [
            (
                len(ours.tok_encode(each["context"])),
                [len(ours.tok_encode(one)) - 1 for one in each["choices"]],
            )
            for each in drawn
        ]
        fitting = [
            (each, (context, choices))
            for each, (context, choices) in zip(drawn, lengths, strict=True)
            if 60 <= context <= 150 and min(choices) >= 3 and max(choices) <= 15
        ]
        asked, tokens = zip(*fitting[: given.questions], strict=True)
        print(
            f"{len(asked)} questions: contexts of {min(c for c, _ in tokens)} to {max(c for c, _ in tokens)} tokens, "
            f"choices of {min(min(n) for _, n in tokens)} to {max(max(n) for _, n in tokens)}"
        )
        write_task(
            Path(directory), CHOICE, "multiple_choice", asked,
            doc_to_text="context", doc_to_choice="choices", doc_to_target="answer",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
        tasks = TaskManager(include_path=directory, include_defaults=False)

        def answer(model: Any, limit: int | None = None) -> Any:
            return simple_evaluate(model, tasks=[CHOICE], task_manager=tasks, limit=limit, bootstrap_iters=0)

        for model in models.values():
            answer(model, limit=8)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        found: dict[str, Any] = {}
        for _ in range(given.repeats):
            for name, model in models.items():
                started = time.perf_counter()
                found[name] = answer(model)
                seconds[name].append(time.perf_counter() - started)

    values = {
        name: [value for sample in each["samples"][CHOICE] for ((value, _),) in sample["resps"]]
        for name, each in found.items()
    }
    own = statistics.median(seconds["bamba-quant"])
    for name, each in seconds.items():
        apart = max(abs(a - b) for a, b in zip(values[name], values["bamba-quant"], strict=True))
        print(
            f"{name:20} {statistics.median(each):8.2f} s ({', '.join(f'{one:.2f}' for one in each)}), "
            f"{statistics.median(each) / own:5.2f} × ours; accuracy {found[name]['results'][CHOICE]['acc,none']:.4f}, "
            f"log-likelihoods within {apart:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
