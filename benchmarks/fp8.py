"""``bamba-quant fp8`` against llm-compressor, on a billion random weights: time without imports, and peak memory.

    python benchmarks/fp8.py --llm-compressor PYTHON [--runs N] [--directory DIR]

Both make a dynamic FP8 checkpoint, a scale for each row (llm_compressor.py says how they are compared, and what PYTHON
is): llm-compressor by ``model_free_ptq`` and by ``oneshot``, this project by its two ways to choose scales. The faster
of llm-compressor's two counts in each round.
"""

from __future__ import annotations

from llm_compressor import compare

if __name__ == "__main__":
    methods = ("search", "absmax")
    compare(__doc__, {f"fp8 --scales {method}": ("fp8-dynamic", method) for method in methods}, "FP8_DYNAMIC")
