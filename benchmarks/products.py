"""float32 matrix products of a model's shapes: ours beside MKL's, oneDNN's and OpenBLAS's, in GFLOP/s.

Rates are the best of several interleaved runs, of the threads that torch uses; OpenBLAS is numpy's, and uses as many.
As in all commands, threads that wait give up their processor. The last column is ours over the fastest of the others.

  python -m benchmarks.products --model bamba_quant/data/bamba-mini
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from bamba_quant_cli.__main__ import WAITING

os.environ.update(WAITING | os.environ)  # before the libraries are loaded

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from bamba_quant.inference.loading import load_model
from bamba_reference.kernels.cpu.matmul import matmul

_OPERATIONS = 2e9  # of a run
# Seconds before a run: a library's threads go on waiting in a loop after its product and would slow the next one.
_PAUSE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("bamba_quant/data/bamba-mini"))
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    weights = load_model(options.model).weights
    shapes = sorted({weights.info(name).shape for name in weights if len(weights.info(name).shape) == 2})
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}")
    print(
        f"{'rows':>5} {'columns':>7} {'terms':>6} {'ours':>6} {'MKL':>6} {'oneDNN':>7} {'OpenBLAS':>9} {'ratio':>6}"
    )
    with torch.no_grad():
        for rows in options.rows:
            for columns, terms in shapes:
                rates = measure(torch.randn(rows, terms), torch.randn(columns, terms), options.runs)
                ours, *others = rates
                print(
                    f"{rows:5} {columns:7} {terms:6} {ours:6.0f} {others[0]:6.0f} {others[1]:7.0f} {others[2]:9.0f} "
                    f"{ours / max(others):6.2f}",
                    flush=True,
                )


def measure(x: torch.Tensor, weight: torch.Tensor, runs: int) -> list[float]:
    """GFLOP/s of x weightᵀ by each library."""
    a, b = x.numpy(), weight.numpy()
    images, filters = x.t()[None, :, None].contiguous(), weight[:, :, None, None]
    products: list[Callable[[], object]] = [
        lambda: matmul(x, weight, None),
        lambda: F.linear(x, weight),
        lambda: F.conv2d(images, filters),  # a product, by a convolution of width one
        lambda: a @ b.T,
    ]
    operations = 2 * x.numel() * len(weight)
    repeats = max(1, round(_OPERATIONS / operations))
    best = [float("inf")] * len(products)
    for product in products:
        product()
    for _ in range(runs):
        for number, product in enumerate(products):
            time.sleep(_PAUSE)
            product()
            started = time.perf_counter()
            for _ in range(repeats):
                product()
            best[number] = min(best[number], (time.perf_counter() - started) / repeats)
    return [operations / seconds / 1e9 for seconds in best]


if __name__ == "__main__":
    main()
