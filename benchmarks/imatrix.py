"""``imatrix`` beside transformers with forward hooks, in one run on a CPU, and its memory on a large model.

    python -m benchmarks.imatrix [--model DIR] [--chunks N] [--repeats N] [--only speed|memory]

Both run the same chunks of 512 random tokens, two at a time, in float32, and add up the squares of what enters every
linear layer; transformers holds its model loaded, imatrix reads and streams it. They take turns; each figure is the
median of --repeats, after a run of each that is not counted, and their sums are compared. Memory: a whole process over
random weights in Bamba-9B's layer shapes, 1.83 billion, in bf16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.embedded import embedded_model
from benchmarks.checkpoints import make_checkpoint, random_text
from benchmarks.forward import take_turns
from benchmarks.processes import run

CTX = 512
TOGETHER = 2  # chunks


def speed(directory: Path, count: int, repeats: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from bamba_quant.calibration.imatrix import collect
    from bamba_quant.inference.loading import load_model

    torch.set_grad_enabled(False)
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sums: dict[str, Any] = {}
    for name, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(module: Any, arguments: Any, name: str = name) -> None:
                squares = arguments[0].flatten(0, -2).square().sum(0)
                sums[name] = sums[name] + squares if name in sums else squares

            module.register_forward_pre_hook(hook)
    loaded = load_model(directory)
    chunks = np.random.default_rng(0).integers(3, loaded.config.vocab_size, (count, CTX))

    def theirs() -> None:
        sums.clear()
        for start in range(0, count, TOGETHER):
            some = torch.from_numpy(chunks[start : start + TOGETHER])
            oracle(some, use_cache=False, logits_to_keep=1)

    found = None

    def ours() -> None:
        nonlocal found
        found = collect(loaded, chunks, ())

    seconds = take_turns({"transformers": theirs, "imatrix": ours}, repeats)
    rates = {name: chunks.size / each for name, each in seconds.items()}
    worst = 0.0
    for name in loaded.weights:
        rule = loaded.weights.stored(name)[1]
        module = rule.hf.removesuffix(".weight")
        if found and rule.gguf in found.entries and module in sums:
            expected = sums[module].double().numpy()
            worst = max(worst, float((abs(found.entries[rule.gguf].squares[0] - expected) / expected).max()))
    print(
        f"{directory.name}, {count} chunks of {CTX}, {torch.get_num_threads()} threads: transformers with hooks "
        f"{rates['transformers']:.0f} tokens/s, imatrix {rates['imatrix']:.0f}: "
        f"{rates['imatrix'] / rates['transformers']:.2f} ×; entries differ by {worst:.1e} at most",
        flush=True,
    )


def memory(directory: Path, chunks: int) -> None:
    model = make_checkpoint(directory / "bamba-9b-shapes-3", 3, (1,))
    text = random_text(directory / "random.txt", CTX * (chunks + 1))
    command = [sys.executable, "-m", "bamba_quant_cli", "imatrix", str(model), "--text", str(text)]
    target = directory / "random-imatrix.gguf"
    wall, peak = run([*command, "--chunks", str(chunks), "--overwrite", "-o", str(target)])
    print(
        f"1.83 billion weights, bf16, {chunks} chunks of {CTX}: {wall:.0f} s, peak {peak:.0f} MB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--model", type=Path, default=embedded_model(), help="a checkpoint directory")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["speed", "memory"])
    options = parser.parse_args()
    options.directory.mkdir(exist_ok=True)
    if options.only != "memory":
        speed(options.model, options.chunks, options.repeats)
    if options.only != "speed":
        memory(options.directory, options.chunks)


if __name__ == "__main__":
    main()
