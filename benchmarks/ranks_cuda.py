"""``evaluate`` in one process and in several, a GPU each: `python -m benchmarks.ranks_cuda --chunks 2048`.

Bamba-9B's exact shape with random weights, made on a GPU (19.6 GB), against its own Q4_K_M file (5.5 GB), every
option of evaluate at its default. A short run in several processes first fills the caches of files and of compiled
kernels; then the whole text, in one process and in several. One table, and whether all figures are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bamba_9b import LAYERS, card, make_pair, place
from benchmarks.checkpoints import random_text
from benchmarks.processes import run

# A word of the random text is more than five tokens.
_TOKENS_OF_A_WORD = 5


def evaluate(processes: int, words: list[str], report: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the whole, torchrun's own included, and the report."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command = [*(start if processes > 1 else [sys.executable]), "-m", "bamba_quant_cli", "evaluate", *words]
    wall, _ = run(["sh", "-c", 'out=$1; shift; "$@" > "$out"', "sh", str(report), *command])
    return wall, json.loads(report.read_text())


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in which two reports differ, but for what tells of the run itself."""
    if where in (".timing", ".run.command", ".run.device", ".run.started", ".run.threads"):
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{where}[{i}]")]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where 25 GB of files go; a temporary one by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--chunks", type=int, default=2048, help="of 512 tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("more", nargs="*", help="further options of evaluate, after --")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < max(options.processes):
        sys.exit(f"torch sees {torch.cuda.device_count()} GPUs")
    # The same for one process as for each of several, so that nothing on the CPU is added up in another order.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(options.processes)))
    with place(options.directory) as directory:
        measure(directory, options)


def measure(directory: Path, options: argparse.Namespace) -> None:
    began = time.perf_counter()
    pair = make_pair(directory, options.layers, options.device)
    text = random_text(directory / "random.txt", 512 * (options.chunks + 1) // _TOKENS_OF_A_WORD)
    print(
        f"{card(options.device)}, {os.cpu_count()} processors, torch {torch.__version__}; files made in "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    words = [
        str(pair.model),
        str(pair.q4_k_m),
        "--text",
        str(text),
        "--device",
        options.device,
        "--dtype",
        "bfloat16",
        "--json",
    ]
    words += options.more
    report = directory / "evaluation.json"
    for processes in options.processes:
        wall, _ = evaluate(processes, [*words, "--chunks", str(32 * processes)], report)
        print(f"a short run in {processes} processes, before: {wall:.1f} s", flush=True)
    words += ["--chunks", str(options.chunks)]
    print(f"evaluate {' '.join(words)}")
    print(
        f"{'processes':>9}{'whole s':>10}{'ratio':>8}{'measuring s':>13}{'ratio':>8}{'computing s':>13}{'ratio':>8}"
    )
    first, expected, same = (0.0, 0.0, 0.0), {}, True
    for processes in (1, *options.processes):
        wall, found = evaluate(processes, words, report)
        timing = found["timing"]
        now = (wall, timing["seconds"], timing["seconds"] * timing["computing"])
        if processes == 1:
            first, expected = now, found
        ratios = [before / seconds for before, seconds in zip(first, now, strict=True)]
        print(
            f"{processes:9}{now[0]:10.1f}{ratios[0]:8.2f}{now[1]:13.1f}{ratios[1]:8.2f}{now[2]:13.1f}{ratios[2]:8.2f}",
            flush=True,
        )
        apart = differences(expected, found)
        same = same and not apart
        for where in apart[:10]:
            print(f"  {where}")
    kld = expected["candidates"][0]["figures"]["kld_mean"]
    print(f"mean KLD {kld['value']!r}, {kld['low']!r} to {kld['high']!r}")
    print("every figure is the same" if same else "figures differ")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
