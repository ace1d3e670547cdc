"""``evaluate`` of Bamba-9B's exact shape on one GPU, files and all: `python -m benchmarks.evaluate_cuda`.

A checkpoint with random weights is made on the GPU (19.6 GB), a text, and the checkpoint's own Q4_K_M file (5.5 GB).
Then the disk's rate is measured on files that are not in the system's cache, and a whole process evaluates the file
against the checkpoint with every option at its default: once with nothing cached, neither files nor compiled kernels,
and once more with both. One table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import points
from benchmarks.bamba_9b import LAYERS, card, make_pair, place
from benchmarks.checkpoints import random_text
from benchmarks.points import Point
from benchmarks.processes import run

_PIECE = 1 << 24
_MEASURED = 4 << 30  # bytes whose reading tells the disk's rate
_SLOW = 1.3e9  # bytes a second of the disk that is required to be enough


def drop(files: Sequence[Path]) -> None:
    """Brings files to the disk and out of the system's cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def disk_rate(files: Sequence[Path], threads: int) -> float:
    """Bytes a second of reading the first of the files, in pieces of 16 MiB."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, _PIECE)]
    pieces = pieces[: _MEASURED // _PIECE]

    def read(piece: tuple[Path, int]) -> int:
        with piece[0].open("rb", buffering=0) as stream:
            return os.preadv(stream.fileno(), [bytearray(_PIECE)], piece[1])

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, pieces))
    seconds = time.perf_counter() - began
    drop(files)
    return total / seconds


def evaluation(command: list[str], report: Path, kernels: Path) -> tuple[float, float, dict[str, Any]]:
    os.environ["TRITON_CACHE_DIR"] = str(kernels)
    wall, peak = run(["sh", "-c", 'out=$1; shift; "$@" > "$out"', "sh", str(report), *command])
    return wall, peak, json.loads(report.read_text())


def show(what: str, wall: float, peak: float, found: dict[str, Any]) -> None:
    timing = found["timing"]
    seconds = {
        part: timing["seconds"] * timing[part]
        for part in ("reading", "dequantizing", "compiling", "computing")
    }
    rest = wall - timing["seconds"] - timing["hashing_seconds"]
    kld = found["candidates"][0]["figures"]["kld_mean"]["value"]
    print(
        f"{what:28}{wall:8.1f}{rest:10.1f}"
        + "".join(f"{each:11.1f}" for each in seconds.values())
        + f"{timing['hashing_seconds']:9.1f}{peak / 1e3:11.1f}{(timing['device_memory'] or 0) / 1e9:11.1f}{kld:12.6f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where 25 GB of files go; a temporary one by default")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("more", nargs="*", help="further options of evaluate, after --")
    points.add_option(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    with place(options.directory) as directory:
        measure(directory, options)


def measure(directory: Path, options: argparse.Namespace) -> None:
    pair = make_pair(directory, options.layers, options.device)
    text = random_text(directory / "random.txt", 512 * (options.chunks + 1))
    files = [*sorted(pair.model.glob("*.safetensors")), pair.q4_k_m]
    size = sum(file.stat().st_size for file in files)
    print(
        f"{card(options.device)}, {os.cpu_count()} processors, torch {torch.__version__}; checkpoint made in "
        f"{pair.making:.0f} s, converted to Q4_K_M in {pair.converting:.0f} s; {size / 1e9:.1f} GB to read"
    )
    drop(files)
    rates = {threads: disk_rate(files, threads) for threads in (1, 8)}
    best = max(rates.values())
    print(
        "the disk reads "
        + ", ".join(f"{rate / 1e9:.2f} GB/s with {threads} threads" for threads, rate in rates.items())
        + f": {size / best:.1f} s for the files alone",
        flush=True,
    )
    command = [sys.executable, "-m", "bamba_quant_cli", "evaluate", str(pair.model), str(pair.q4_k_m)]
    command += [
        "--text",
        str(text),
        "--ctx",
        "512",
        "--chunks",
        str(options.chunks),
        "--device",
        options.device,
        "--json",
    ]
    command += ["--dtype", "bfloat16", *options.more]
    print(" ".join(command[1:]))
    print(
        f"{'seconds':28}{'wall':>8}{'start+end':>10}{'reading':>11}{'decoding':>11}{'compiling':>11}{'computing':>11}"
        f"{'hashing':>9}{'host GB':>11}{'GPU GB':>11}{'KLD':>12}"
    )
    with tempfile.TemporaryDirectory() as kernels:
        report = directory / "evaluation.json"
        drop(files)
        first = evaluation(command, report, Path(kernels))
        show("nothing cached", *first)
        again = evaluation(command, report, Path(kernels))
        show("files and kernels cached", *again)
    same = first[2]["candidates"] == again[2]["candidates"]
    print("every figure of the two runs is the same" if same else "the two runs' figures differ")
    assert math.isfinite(first[2]["candidates"][0]["figures"]["kld_mean"]["value"])
    points.write(required(first[0], size, best, first[2]["timing"], options.chunks), options.points)


def required(wall: float, size: int, rate: float, timing: dict[str, Any], chunks: int) -> list[Point]:
    """Of a run with nothing cached, ``size`` bytes from a disk of ``rate``; a slower one would have added at most what
    it takes longer for the files alone.
    """
    slower = wall + max(0.0, size / _SLOW - size / rate)
    computing, memory = timing["seconds"] * timing["computing"], timing["device_memory"] or 0
    told = f"{wall:.1f} s from a disk of {rate / 1e9:.2f} GB/s; {slower:.1f} s by addition"
    what = f"bfloat16 against its Q4_K_M, {chunks} × 512 tokens"
    return [
        Point(f"{what}, nothing cached, from 1.3 GB/s", "< 60 s", told, slower < 60),
        Point(f"{what}, of which computing", "< 6 s", f"{computing:.1f} s", computing < 6),
        Point(f"{what}, peak on the card", "printed", f"{memory / 1e9:.1f} GB", True),
    ]


if __name__ == "__main__":
    main()
