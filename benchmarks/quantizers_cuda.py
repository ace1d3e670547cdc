"""Prints how fast each format quantizes on a GPU, device to device: `python -m benchmarks.quantizers_cuda`.

Weights are normal with deviation 0.02, in the shape of one of Bamba-9B's matrices. Figures are GB of float32
input a second: medians on the GPU, and beside them the compiled CPU twin on a few threads of the same
machine. The bytes of both are compared first, over inputs that reach every branch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bamba_quant.codecs import Format, formats
from bamba_quant.codecs.base import F32
from bamba_quant.codecs.cuda import encode
from bamba_quant.codecs.dispatch import quantizer
from tests.codecs.inputs import importances, weights

SHAPE = (4096, 14336)
CPU_ROWS = 256  # enough to time the CPU by


def main() -> None:
    names = [number_format.name for number_format in formats() if number_format.writable]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(names)}; all when none is given")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU twin")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.02, SHAPE).astype(np.float32)
    importance = rng.random(SHAPE[1]).astype(np.float32)
    print(f"{torch.cuda.get_device_name()}; GB/s of input; CPU twin on {options.threads} threads")
    print("format   importance |  first s | bytes | GPU GB/s | CPU GB/s | ratio")
    for number_format in formats():
        if number_format.writable and (not options.formats or number_format.name in options.formats):
            for weight in (None, importance):
                _report(number_format, x, weight, options.rounds, options.threads)


def _report(number_format: Format, x: F32, importance: F32 | None, rounds: int, threads: int) -> None:
    start = time.perf_counter()
    _encode(number_format, x[:1], importance)
    first = time.perf_counter() - start
    wrong = _differing(number_format, importance is not None)
    gpu = x.nbytes / _gpu_seconds(number_format, x, importance, rounds) / 1e9
    cpu = x[:CPU_ROWS].nbytes / _cpu_seconds(number_format, x[:CPU_ROWS], importance, threads) / 1e9
    verdict = f"{wrong} wrong" if wrong else "equal"
    print(
        f"{number_format.name:8} {'no' if importance is None else 'yes':10} | {first:8.1f} | {verdict:5} | "
        f"{gpu:8.1f} | {cpu:8.2f} | {gpu / cpu:5.0f}",
        flush=True,
    )


def _encode(number_format: Format, x: F32, importance: F32 | None) -> np.ndarray:
    weight = None if importance is None else torch.from_numpy(importance).cuda()
    return encode(number_format, torch.from_numpy(x).cuda(), weight).cpu().numpy()


def _differing(number_format: Format, weighted: bool) -> int:
    """Bytes that differ from the CPU twin's over the inputs of the test suite."""
    compiled = quantizer(number_format, "cpu")
    return sum(
        int((_encode(number_format, x, importance) != compiled(x, importance)).sum())
        for x in weights().values()
        for importance in importances().values()
        if (importance is not None) == weighted
    )


def _gpu_seconds(number_format: Format, x: F32, importance: F32 | None, rounds: int) -> float:
    rows = torch.from_numpy(x).cuda()
    weight = None if importance is None else torch.from_numpy(importance).cuda()
    encode(number_format, rows, weight)
    seconds = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        encode(number_format, rows, weight)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _cpu_seconds(number_format: Format, x: F32, importance: F32 | None, threads: int) -> float:
    compiled = quantizer(number_format, "cpu")
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda rows: compiled(rows, importance), np.array_split(x, 4 * threads)))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
