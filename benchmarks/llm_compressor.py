"""The same checkpoint through this project and llm-compressor in turn: time without imports, and peak memory.

The checkpoint has a billion random weights. Every tool takes its turn in each round, as a process of its own:
``model_free_ptq``, ``oneshot`` with what it needs around it, and this project's methods. Seconds are those from the
end of the imports to the finished directory. llm-compressor's requirements are not this project's, so it lives in an
environment of its own, whose interpreter ``--llm-compressor`` names:

    python3 -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from checkpoints import make_checkpoint
from processes import run

OURS = """
import sys, time
from pathlib import Path
import numba
from bamba_quant.planning.quantize import plan_quantization
from bamba_quant.writers import write_plan
source, target, seconds, scheme, method = sys.argv[1:]
started = time.monotonic()
write_plan(plan_quantization(source, scheme, method=method), Path(target))
open(seconds, "w").write(str(time.monotonic() - started))
"""

THEIRS = {
    "model_free_ptq": """
import sys, time
from llmcompressor import model_free_ptq
source, target, seconds, scheme = sys.argv[1:]
started = time.monotonic()
ignore = ["lm_head", "model.embed_tokens", "re:.*conv1d$"]
model_free_ptq(source, target, scheme=scheme, ignore=ignore, max_workers=2, device="cpu")
open(seconds, "w").write(str(time.monotonic() - started))
""",
    "oneshot": """
import sys, time
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, target, seconds, scheme = sys.argv[1:]
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
model.save_pretrained(target)
open(seconds, "w").write(str(time.monotonic() - started))
""",
}


def compare(description: str | None, ours: Mapping[str, tuple[str, str]], theirs: str) -> None:
    """Time this project's (scheme, method) pairs by their names in print beside ``theirs``, a preset of theirs."""
    options = _asked(description)
    source = make_checkpoint(
        options.directory / f"bamba-9b-shapes-3-{options.dtype}",
        3,
        (1,),
        vocab_size=32256,
        dtype=options.dtype,
    )
    target, seconds = options.directory / "quantized", options.directory / "seconds"
    tools = {name: [sys.executable, OURS, *arguments] for name, arguments in ours.items()}
    if options.llm_compressor:
        tools |= {
            f"{name} {theirs}": [options.llm_compressor, script, theirs] for name, script in THEIRS.items()
        }
    work: dict[str, list[float]] = {name: [] for name in tools}
    walls: dict[str, list[float]] = {name: [] for name in tools}
    peaks: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(options.runs + 1):
        for name, (python, script, *arguments) in tools.items():
            shutil.rmtree(target, ignore_errors=True)
            wall, peak = run([python, "-c", script, str(source), str(target), str(seconds), *arguments])
            if number:
                work[name].append(float(seconds.read_text()))
                walls[name].append(wall)
                peaks[name].append(peak)
    shutil.rmtree(target, ignore_errors=True)
    n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{n_bytes / 1e9:.2f} GB of {options.dtype}, {options.runs} rounds (median, least to most):")
    others = [times for name, times in work.items() if name not in ours]
    for name in tools:
        print(
            f"  {name:24} {_shown(work[name])} s without imports, {_shown(walls[name])} s in all, "
            f"peak {max(peaks[name]):.0f} MB"
        )
        if others and name in ours:
            rounds = zip(zip(*others, strict=True), work[name], strict=True)
            print(f"  {'':24} {_shown([min(times) / mine for times, mine in rounds], 1)} × as fast as theirs")


def _asked(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--llm-compressor", default=os.environ.get("LLM_COMPRESSOR_PYTHON"), metavar="PYTHON")
    parser.add_argument("--runs", type=int, default=3, help="counted rounds, after one that is not")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint: float32 or bfloat16")
    return parser.parse_args()


def _shown(figures: list[float], digits: int = 2) -> str:
    return f"{statistics.median(figures):.{digits}f} ({min(figures):.{digits}f} to {max(figures):.{digits}f})"
