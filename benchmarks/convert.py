"""bf16 to bf16 against ``cp`` of the same bytes: wall time as a ratio in one run, and peak resident memory.

    python benchmarks/convert.py [--layers N …] [--runs N] [--directory DIR]

The checkpoint has random weights in Bamba-9B's layer shapes: 1.83 billion with three layers. ``cp`` and the
conversion take turns, each writing to the same disk; both read from the page cache after a first round. The same is
run on a smaller checkpoint, to show that memory does not grow with the model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkpoints import make_checkpoint


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of a process, as the kernel counts them."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    scale = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - started, usage.ru_maxrss * scale / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("bench"), help="where the files go")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6], help="sizes of the checkpoints")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds, after one that is not")
    options = parser.parse_args()
    for layers in options.layers:
        source = make_checkpoint(options.directory / f"bamba-9b-shapes-{layers}", layers, (layers // 2,))
        copy, converted = options.directory / "copy", options.directory / "converted.gguf"
        convert = [sys.executable, "-m", "bamba_quant_cli", "convert", str(source), "--outtype", "bf16",
                   "--outfile", str(converted)]  # fmt: skip
        copied, ours = [], []
        for _ in range(options.runs + 1):
            copied.append(run(["cp", "-r", str(source), str(copy)]))
            shutil.rmtree(copy)
            ours.append(run(convert))
            converted.unlink()
        copied, ours = copied[1:], ours[1:]
        n_bytes = sum(file.stat().st_size for file in source.iterdir())
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(ours, copied, strict=True)]
        print(f"{n_bytes / 1e9:.2f} GB, {layers} layers, {options.runs} rounds (median, least to most):")
        print(f"  cp       {shown([wall for wall, _ in copied], 's')}")
        print(f"  convert  {shown([wall for wall, _ in ours], 's')}, peak {max(peak for _, peak in ours):.0f} MB")
        print(f"  ratio    {shown(ratios, '')}", flush=True)


def shown(figures: list[float], unit: str) -> str:
    return f"{statistics.median(figures):.2f} {unit} ({min(figures):.2f} to {max(figures):.2f})"


if __name__ == "__main__":
    main()
