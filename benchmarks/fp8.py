"""``bamba-quant fp8`` against llm-compressor, on a billion random weights: time without imports, and peak memory.

    python benchmarks/fp8.py --llm-compressor PYTHON [--runs N] [--directory DIR]

PYTHON is the interpreter of an environment with llm-compressor, whose requirements are not this project's:

    python3 -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

Every tool takes its turn in each round, as a process of its own that makes a dynamic FP8 checkpoint (a scale for each
row) from the same files: ``model_free_ptq``, ``oneshot`` with what it needs around it, and this project's two ways to
choose scales. Seconds are those from the end of the imports to the finished directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from checkpoints import make_checkpoint
from processes import run

OURS = """
import sys, time
import numba
from bamba_quant.quantize import plan_quantization
from bamba_quant.writers.quantized import write_quantized
source, target, method, seconds = sys.argv[1:]
started = time.monotonic()
write_quantized(plan_quantization(source, "fp8-dynamic", method=method), __import__("pathlib").Path(target))
open(seconds, "w").write(str(time.monotonic() - started))
"""

MODEL_FREE = """
import sys, time
from llmcompressor import model_free_ptq
source, target, _, seconds = sys.argv[1:]
started = time.monotonic()
ignore = ["lm_head", "model.embed_tokens", "re:.*conv1d$"]
model_free_ptq(source, target, scheme="FP8_DYNAMIC", ignore=ignore, max_workers=2, device="cpu")
open(seconds, "w").write(str(time.monotonic() - started))
"""

ONESHOT = """
import sys, time
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, target, _, seconds = sys.argv[1:]
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
model.save_pretrained(target)
open(seconds, "w").write(str(time.monotonic() - started))
"""


def asked(description: str | None) -> tuple[argparse.Namespace, Path]:
    """The options of these benchmarks, and the checkpoint of a billion weights that they want."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--llm-compressor", default=os.environ.get("LLM_COMPRESSOR_PYTHON"), metavar="PYTHON")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds, after one that is not")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint: float32 or bfloat16")
    options = parser.parse_args()
    return options, make_checkpoint(
        options.directory / f"bamba-9b-shapes-3-{options.dtype}",
        3,
        (1,),
        vocab_size=32256,
        dtype=options.dtype,
    )


def main() -> None:
    options, source = asked(__doc__)
    target, seconds = options.directory / "fp8", options.directory / "seconds"
    theirs = options.llm_compressor
    tools = {
        "fp8 --scales search": [sys.executable, "-c", OURS, "search"],
        "fp8 --scales absmax": [sys.executable, "-c", OURS, "absmax"],
    }
    if theirs:
        tools |= {
            "model_free_ptq": [theirs, "-c", MODEL_FREE, "-"],
            "oneshot": [theirs, "-c", ONESHOT, "-"],
        }
    work: dict[str, list[float]] = {name: [] for name in tools}
    walls: dict[str, list[float]] = {name: [] for name in tools}
    peaks: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(options.runs + 1):
        for name, (python, flag, script, method) in tools.items():
            shutil.rmtree(target, ignore_errors=True)
            wall, peak = run([python, flag, script, str(source), str(target), method, str(seconds)])
            if number:
                work[name].append(float(seconds.read_text()))
                walls[name].append(wall)
                peaks[name].append(peak)
    shutil.rmtree(target, ignore_errors=True)
    n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{n_bytes / 1e9:.2f} GB of {options.dtype}, {options.runs} rounds (median, least to most):")
    for name in tools:
        print(
            f"  {name:20} {shown(work[name])} without imports, {shown(walls[name])} in all, "
            f"peak {max(peaks[name]):.0f} MB"
        )
    if theirs:
        for name in ("fp8 --scales search", "fp8 --scales absmax"):
            ratios = [
                min(others) / mine
                for mine, *others in zip(work[name], work["model_free_ptq"], work["oneshot"], strict=True)
            ]
            print(
                f"  {name} is {statistics.median(ratios):.1f} × as fast as the faster of them "
                f"({min(ratios):.1f} to {max(ratios):.1f})"
            )


def shown(figures: list[float]) -> str:
    return f"{statistics.median(figures):.2f} s ({min(figures):.2f} to {max(figures):.2f})"


if __name__ == "__main__":
    main()
