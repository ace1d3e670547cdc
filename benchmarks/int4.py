"""``bamba-quant int4`` against llm-compressor, on a billion random weights: time without imports, and peak memory.

    python benchmarks/int4.py --llm-compressor PYTHON [--runs N] [--directory DIR]

PYTHON is the interpreter of an environment with llm-compressor (see fp8.py). Every tool takes its turn in each round,
as a process of its own that makes a W4A16 checkpoint (integers of four bits, symmetric, a scale for 128 columns) from
the same files: ``model_free_ptq``, and this project's three ways to choose scales. Seconds are those from the end of
the imports to the finished directory.
"""

from __future__ import annotations

import shutil
import statistics
import sys

from fp8 import asked, shown
from processes import run

OURS = """
import sys, time
from pathlib import Path
import numba
from bamba_quant.quantize import plan_quantization
from bamba_quant.writers.quantized import write_quantized
source, target, scheme, method, seconds = sys.argv[1:]
started = time.monotonic()
write_quantized(plan_quantization(source, scheme, method=method), Path(target))
open(seconds, "w").write(str(time.monotonic() - started))
"""

MODEL_FREE = """
import sys, time
from llmcompressor import model_free_ptq
source, target, scheme, _, seconds = sys.argv[1:]
started = time.monotonic()
ignore = ["lm_head", "model.embed_tokens", "re:.*conv1d$"]
model_free_ptq(source, target, scheme=scheme, ignore=ignore, max_workers=2, device="cpu")
open(seconds, "w").write(str(time.monotonic() - started))
"""


def main() -> None:
    options, source = asked(__doc__)
    target, seconds = options.directory / "int4", options.directory / "seconds"
    ours = {
        f"{scheme} {method}": [sys.executable, OURS, scheme, method]
        for scheme in ("w4a16-g128", "w4a16-asym-g128", "torchao-int4-g128")
        for method in ("rtn", "mse", "hqq")
    }
    theirs = [options.llm_compressor, MODEL_FREE, "W4A16", "-"] if options.llm_compressor else None
    tools = ours | ({"model_free_ptq W4A16": theirs} if theirs else {})
    work: dict[str, list[float]] = {name: [] for name in tools}
    peaks: dict[str, list[float]] = {name: [] for name in tools}
    for number in range(options.runs + 1):
        for name, (python, script, scheme, method) in tools.items():
            shutil.rmtree(target, ignore_errors=True)
            command = [python, "-c", script, str(source), str(target), scheme, method, str(seconds)]
            _, peak = run(command)
            if number:
                work[name].append(float(seconds.read_text()))
                peaks[name].append(peak)
    shutil.rmtree(target, ignore_errors=True)
    n_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{n_bytes / 1e9:.2f} GB of {options.dtype}, {options.runs} rounds (median, least to most):")
    for name in tools:
        print(f"  {name:24} {shown(work[name])} without imports, peak {max(peaks[name]):.0f} MB")
        if theirs and name in ours:
            pairs = zip(work["model_free_ptq W4A16"], work[name], strict=True)
            print(f"  {'':24} {statistics.median(other / mine for other, mine in pairs):.1f} × as fast")


if __name__ == "__main__":
    main()
