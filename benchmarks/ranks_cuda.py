"""``evaluate`` in one process and in several, a GPU each: `python -m benchmarks.ranks_cuda`.

Bamba-9B's exact shape with random weights, made on a GPU (19.6 GB), against its own Q4_K_M file (5.5 GB), every
option of evaluate at its default. A short run in several processes first fills the caches of files and of compiled
kernels; then the whole text, in one process and in several, started by --processes and by torchrun. One table, and
whether all figures are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import points
from benchmarks.bamba_9b import LAYERS, card, make_pair, place
from benchmarks.checkpoints import random_text
from benchmarks.points import Point
from benchmarks.processes import run

# A word of the random text is more than five tokens.
_TOKENS_OF_A_WORD = 5

WAYS = ("processes", "torchrun")


def evaluate(start: Sequence[str], words: Sequence[str], report: Path) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the whole, what starts it included, and the report."""
    command = [sys.executable, "-m", *start, "evaluate", *words]
    wall, _ = run(["sh", "-c", 'out=$1; shift; "$@" > "$out"', "sh", str(report), *command])
    return wall, json.loads(report.read_text())


def starts(processes: int) -> dict[str, tuple[list[str], list[str]]]:
    """Of each way to start so many processes, in the order of ``WAYS``, the words before and behind ``evaluate``."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return {
        f"--processes {processes}": (["bamba_quant_cli"], ["--processes", str(processes)]),
        f"torchrun --nproc-per-node {processes}": ([*torchrun, "bamba_quant_cli"], []),
    }


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
    parser.add_argument("--by", nargs="+", choices=WAYS, default=WAYS, help="what starts the processes")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--chunks", type=int, default=6144, help="of 512 tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("more", nargs="*", help="further options of evaluate, after --")
    points.add_option(parser)
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
        before, behind = starts(processes)[f"--processes {processes}"]
        wall, _ = evaluate(before, [*words, "--chunks", str(32 * processes), *behind], report)
        print(f"a short run in {processes} processes, before: {wall:.1f} s", flush=True)
    words += ["--chunks", str(options.chunks)]
    print(f"evaluate {' '.join(words)}")
    print(f"{'':30}{'whole s':>10}{'ratio':>8}{'measuring s':>13}{'ratio':>8}{'computing s':>13}{'ratio':>8}")
    first, expected, same, held = (0.0, 0.0, 0.0), dict[str, Any](), True, list[Point]()
    ways = [(1, "one process", (["bamba_quant_cli"], list[str]()))]
    for processes in options.processes:
        named = zip(WAYS, starts(processes).items(), strict=True)
        ways += [(processes, name, start) for way, (name, start) in named if way in options.by]
    for processes, name, (before, behind) in ways:
        wall, found = evaluate(before, [*words, *behind], report)
        timing = found["timing"]
        now = (wall, timing["seconds"], timing["seconds"] * timing["computing"])
        if processes == 1:
            first, expected = now, found
        ratios = [alone / seconds for alone, seconds in zip(first, now, strict=True)]
        print(
            f"{name:30}{now[0]:10.1f}{ratios[0]:8.2f}{now[1]:13.1f}{ratios[1]:8.2f}{now[2]:13.1f}{ratios[2]:8.2f}",
            flush=True,
        )
        apart = differences(expected, found)
        same = same and not apart
        if processes > 1:
            least = 0.925 * processes
            what = f"{processes} GPUs by {name}, {options.chunks:,} × 512 tokens, whole processes of as many threads"
            told = f"{ratios[0]:.2f} × ({first[0]:.1f} to {now[0]:.1f} s; {ratios[1]:.2f} × without start and end)"
            told += ", same figures" if not apart else ", other figures"
            held.append(
                Point(what, f">= {least:.2f} ×, same figures", told, ratios[0] >= least and not apart)
            )
        for where in apart[:10]:
            print(f"  {where}")
    kld = expected["candidates"][0]["figures"]["kld_mean"]
    print(f"mean KLD {kld['value']!r}, {kld['low']!r} to {kld['high']!r}")
    print("every figure is the same" if same else "figures differ")
    points.write(held, options.points)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
