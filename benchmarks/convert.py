"""bf16 to bf16 against ``cp`` and ``sync`` of the same bytes: wall time as a ratio in one run, system time, memory.

    python benchmarks/convert.py [--layers N …] [--runs N] [--directory DIR]

The checkpoint has random weights in Bamba-9B's layer shapes: 1.83 billion with three layers. ``cp`` with ``sync`` and
the conversion, which flushes its file too, take turns, each writing to the same disk; both read from the page cache
after a first round. The same is run on a smaller checkpoint, to show that memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints import make_checkpoint
from processes import run_with_system_time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6], help="sizes of the checkpoints")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds, after one that is not")
    options = parser.parse_args()
    for layers in options.layers:
        source = make_checkpoint(options.directory / f"bamba-9b-shapes-{layers}", layers, (layers // 2,))
        copy, converted = options.directory / "copy", options.directory / "converted.gguf"
        cp = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(copy)]
        convert = [sys.executable, "-m", "bamba_quant_cli", "convert", str(source), "--outtype", "bf16",
                   "--outfile", str(converted)]  # fmt: skip
        copied, ours = [], []
        for _ in range(options.runs + 1):
            copied.append(run_with_system_time(cp))
            shutil.rmtree(copy)
            ours.append(run_with_system_time(convert))
            converted.unlink()
        copied, ours = copied[1:], ours[1:]
        n_bytes = sum(file.stat().st_size for file in source.iterdir())
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(ours, copied, strict=True)]
        print(f"{n_bytes / 1e9:.2f} GB, {layers} layers, {options.runs} rounds (median, least to most):")
        for name, times in (("cp, sync", copied), ("convert", ours)):
            wall, system, peak = zip(*times, strict=True)
            print(f"  {name:9} {summary(wall, 's')}, system {summary(system, 's')}, peak {max(peak):.0f} MB")
        print(f"  {'ratio':9} {summary(ratios, '')}", flush=True)


def summary(figures: Sequence[float], unit: str) -> str:
    return f"{statistics.median(figures):.2f} {unit} ({min(figures):.2f} to {max(figures):.2f})"


if __name__ == "__main__":
    main()
