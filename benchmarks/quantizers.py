"""Prints how fast each format quantizes, ggml and ours in turn: `python -m benchmarks.quantizers`.

Weights are normal with deviation 0.02, as rows of 4096; ggml runs in llama-cpp-python's library. Every
figure is the median of rounds in which all contenders take their turn, in million weights a second. Bytes
are compared as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import Quantize
from tests.support import ggml

COLUMNS = 4096
NUMPY_SHARE = 8  # numpy is slow enough to measure on an eighth of the rows


def main() -> None:
    names = [codec.name for codec in codecs(BlockCodec) if codec.writable]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(names)}; all when none is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if ggml.library_path() is None:
        sys.exit("llama-cpp-python's libggml-base is not installed: pip install '.[test]'")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.02, (options.rows, COLUMNS)).astype(np.float32)
    importance = rng.random(COLUMNS).astype(np.float32)
    for threads in options.threads:
        print(f"\n{threads} thread{'s' * (threads > 1)}, Mweights/s | without importance | with importance")
        print("format   |    ggml    ours  ratio   numpy |    ggml    ours  ratio   numpy")
        for codec in codecs(BlockCodec):
            if codec.writable and (not options.formats or codec.name in options.formats):
                cells = [_compare(codec, x, weight, threads, options.rounds) for weight in (None, importance)]
                print(f"{codec.name:8} | " + " | ".join(cells), flush=True)


def _compare(codec: BlockCodec, x: F32, importance: F32 | None, threads: int, rounds: int) -> str:
    contenders: dict[str, tuple[Quantize, F32]] = {
        "ggml": (lambda rows, weight: ggml.quantize(codec, rows, weight), x),
        "ours": (codec.quantizer(), x),
        "numpy": (codec.quantize, x[: len(x) // NUMPY_SHARE]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    written: dict[str, U8] = {}
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(rounds + 1):
            for name, (quantize, rows) in contenders.items():
                start = time.perf_counter()
                parts = list(pool.map(_bound(quantize, importance), _chunks(rows, threads)))
                if turn:  # the first round warms caches and compiles
                    seconds[name].append(time.perf_counter() - start)
                else:
                    written[name] = np.concatenate(parts)
    if not np.array_equal(written["ours"], written["ggml"]):
        sys.exit(f"{codec.name}: bytes differ from ggml's")
    rate = {
        name: contenders[name][1].size / statistics.median(times) / 1e6 for name, times in seconds.items()
    }
    return f"{rate['ggml']:7.1f} {rate['ours']:7.1f} {rate['ours'] / rate['ggml']:6.1f} {rate['numpy']:7.1f}"


def _bound(quantize: Quantize, importance: F32 | None) -> Callable[[F32], U8]:
    return lambda rows: quantize(rows, importance)


def _chunks(x: F32, threads: int) -> Iterable[F32]:
    """Four chunks of rows a thread, as a writer that streams would hand them out."""
    return np.array_split(x, 4 * threads)


if __name__ == "__main__":
    main()
