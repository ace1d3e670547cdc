"""``bamba-quant int4`` against llm-compressor, on a billion random weights: time without imports, and peak memory.

    python benchmarks/int4.py --llm-compressor PYTHON [--runs N] [--directory DIR]

llm-compressor makes a W4A16 checkpoint (integers of four bits, symmetric, a scale for 128 columns, rounded to nearest)
by ``model_free_ptq`` and by ``oneshot``, this project one of the same layout, one with zero points and torchao's by its
three ways to choose scales (llm_compressor.py says how they are compared, and what PYTHON is). The faster of
llm-compressor's two counts in each round.
"""

from __future__ import annotations

from itertools import product

from llm_compressor import compare

if __name__ == "__main__":
    pairs = product(("w4a16-g128", "w4a16-asym-g128", "torchao-int4-g128"), ("rtn", "mse", "hqq"))
    compare(__doc__, {f"{scheme} {method}": (scheme, method) for scheme, method in pairs}, "W4A16")
