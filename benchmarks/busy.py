"""Whole processes of ``evaluate`` by number of threads, alone and beside processes that keep all processors busy.

Prints the wall time of the default over that of the fastest number of threads, each the median of interleaved runs.

  python -m benchmarks.busy BASE CANDIDATE... --text FILE --chunks 8
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="BASE CANDIDATE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", default="8")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4], help="Busy processes beside it.")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    command = [sys.executable, "-m", "bamba_quant_cli", "evaluate", *map(str, options.models)]
    command += ["--text", str(options.text), "--chunks", options.chunks]
    settings: dict[str, list[str]] = {"default": []} | {
        f"--threads {n}": ["--threads", str(n)] for n in range(1, (os.cpu_count() or 1) + 1)
    }
    run(command)  # compiles kernels
    for busy in options.busy:
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            seconds: dict[str, list[float]] = {name: [] for name in settings}
            for _ in range(options.runs):
                for name, threads in settings.items():
                    started = time.perf_counter()
                    run([*command, *threads])
                    seconds[name].append(time.perf_counter() - started)
        finally:
            for process in spinning:
                process.kill()
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        shown = ", ".join(f"{name} {median:.1f} s" for name, median in medians.items())
        print(
            f"{busy} busy processes: {shown}; default over best {medians['default'] / min(medians.values()):.2f}"
        )


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
